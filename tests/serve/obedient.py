"""A script that follows whatever a request's grammar allows: for requests that nobody foresaw."""

from collections.abc import AsyncGenerator
from dataclasses import replace

import numpy as np

from freehold.engine.request import FinishReason, Step
from freehold.session.scripted import ScriptedRunner, ScriptedTurn, serve_script
from freehold.session.served import Served

_MOST_TOKENS = 24


class Obedient(ScriptedRunner):
    """Says what its script says where that is allowed from beginning to end, else the first tokens that are allowed."""

    async def _play(self, run):  # type: ignore[no-untyped-def]
        request = run.request
        if request.constraint is None:
            async for step in super()._play(run):
                yield step
            return
        async for step in self._follow(run):
            yield step

    async def _follow(self, run) -> AsyncGenerator[Step]:  # type: ignore[no-untyped-def]
        request = run.request
        constraints = [request.constraint() for _ in range(request.n)]
        row = np.zeros(-(-self._tokenizer.vocab_size // 32), np.int32)
        most = min(request.max_tokens, _MOST_TOKENS)
        ended = [False] * request.n
        for number in range(1, most + 1):
            for index, constraint in enumerate(constraints):
                if ended[index]:
                    continue
                constraint.fill_mask(row)
                allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
                stops = [int(token) for token in allowed if int(token) in request.stop_ids]
                token = stops[0] if stops else int(allowed[number % len(allowed)])
                constraint.accept(token)
                ended[index] = token in request.stop_ids or constraint.is_finished()
                finish: FinishReason | None = "stop" if ended[index] else "length" if number == most else None
                self._num_generated_tokens += 1
                yield self._step(run, index, (token,), finish, number)
            if all(ended):
                return


def serve_obedient(answer: str = "ok") -> Served:
    """A served model that never says what is not allowed."""
    turn = ScriptedTurn.from_json({"match": "", "answer": answer})
    served = serve_script([turn])
    return replace(served, runner=Obedient([turn], served.prompting.the_tokenizer()))
