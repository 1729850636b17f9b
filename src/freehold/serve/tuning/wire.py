"""Fine-tuning jobs on the wire: what `/v1/fine_tuning/jobs` reads. Models only.

Fields are those of the `openai` package. What there is of them that training here cannot do is refused by name: nobody
should wait for hours for something else than what was asked for.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from freehold.serve.responses.wire import Id, Metadata
from freehold.serve.wire import Refused, Wire

PURPOSE, RESULTS_PURPOSE = "fine-tune", "fine-tune-results"
_SUFFIX_CHARACTERS = 40
_SUFFIX = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{_SUFFIX_CHARACTERS - 1}}}")
"""What a model's name can hold, with what makes it one of its own."""
LARGEST_SEED = 2**31 - 1
_OLD_AND_NEW = "'hyperparameters' is the old place of 'method.supervised.hyperparameters': send one of them"


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("shape", "must be a number or 'auto'")
    return value


_Auto = Literal["auto"]
Epochs = Annotated[Annotated[int, Field(ge=1, le=50)] | _Auto, BeforeValidator(_no_bool)]
BatchSize = Annotated[Annotated[int, Field(ge=1, le=256)] | _Auto, BeforeValidator(_no_bool)]
Multiplier = Annotated[Annotated[float, Field(gt=0, le=100)] | _Auto, BeforeValidator(_no_bool)]
Beta = Annotated[Annotated[float, Field(gt=0, le=2)] | _Auto, BeforeValidator(_no_bool)]


class Hyperparameters(Wire):
    """`auto` is what `freehold tune` does by itself, which the job says once it runs."""

    n_epochs: Epochs = "auto"
    batch_size: BatchSize = "auto"
    learning_rate_multiplier: Multiplier = "auto"


class DpoHyperparameters(Hyperparameters):
    beta: Beta = "auto"


class SupervisedMethod(Wire):
    hyperparameters: Hyperparameters | None = None


class DpoMethod(Wire):
    hyperparameters: DpoHyperparameters | None = None


class Method(Wire):
    """With the object of its own type, and no other."""

    type: Annotated[Literal["supervised", "dpo"], BeforeValidator(lambda value: _method(value))]
    supervised: SupervisedMethod | None = None
    dpo: DpoMethod | None = None
    reinforcement: Annotated[Any, Refused("there are no graders here")] = None

    @model_validator(mode="after")
    def _only_its_own(self) -> "Method":
        for kind in ("supervised", "dpo"):
            if kind != self.type and getattr(self, kind) is not None:
                raise PydanticCustomError("shape", "has a 'type' and the object of another one")
        return self


def _method(value: Any) -> Any:
    if value == "reinforcement":
        raise PydanticCustomError("refused", "is not supported: there are no graders here; send 'supervised' or 'dpo'")
    return value


def _suffix(value: str | None) -> str | None:
    if value is not None and not _SUFFIX.fullmatch(value):
        raise PydanticCustomError(
            "shape", f"must be 1 to {_SUFFIX_CHARACTERS} letters, digits, dots, dashes and underscores, a letter or "
            "digit first",
        )  # fmt: skip
    return value


class JobCreate(Wire):
    """The body of `POST /v1/fine_tuning/jobs`."""

    model: Annotated[str, Field(description="The model that is served, or one that was fine-tuned here")]
    training_file: Id
    validation_file: Id | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: Annotated[str | None, AfterValidator(_suffix), Field(description="The result's name begins with it")] = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] | None = None
    metadata: Metadata = None
    integrations: Annotated[Any, Refused("nothing is sent to anybody", unless=(None, []))] = None

    @model_validator(mode="after")
    def _one_place(self) -> "JobCreate":
        if self.hyperparameters is not None and self.method is not None:
            raise PydanticCustomError("shape", _OLD_AND_NEW)
        return self

    @property
    def the_method(self) -> Method:
        """As it is meant, wherever it was said."""
        if self.method is not None:
            return self.method
        return Method(type="supervised", supervised=SupervisedMethod(hyperparameters=self.hyperparameters))
