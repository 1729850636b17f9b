"""A run from its files to its result: read, plan, load, train, write down. What `freehold tune` is made of.

    DIR/run.json            everything that decides what comes out: model, data, options, how it is computed
    DIR/metrics.jsonl       as it goes on (metrics.py), and curves.png where matplotlib is there
    DIR/checkpoints/        where it can go on (checkpoints.py)
    DIR/adapter_config.json, adapter_model.safetensors, README.md     the result, when it is done

`prepare` reads and checks all that can be known without the model's weights. A run that goes on is refused where its
data, its model or its options are no longer those that it began with.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from freehold import __version__
from freehold.disk import exclusive, write_text, written_to
from freehold.errors import DiskSpaceError, UnsupportedError, UsageError
from freehold.formats import chat
from freehold.formats.chat import ChatFormat
from freehold.formats.conversation import SystemContent
from freehold.formats.tokenizer import Tokenizer
from freehold.hub.find import find_model
from freehold.hub.folder import ModelFolder, open_folder
from freehold.log import Progress, no_progress
from freehold.model.lora import AdapterSpec
from freehold.session.model import load_transformer
from freehold.session.policy import Policy, decide, instruction_set
from freehold.train import curves
from freehold.train.card import model_card
from freehold.train.checkpoints import Checkpoints
from freehold.train.data import DataOptions, TrainingData, read_examples
from freehold.train.loop import Loop, Outcome
from freehold.train.metrics import Report, read_metrics
from freehold.train.options import LoopOptions, LoraOptions, LoraTarget, differences
from freehold.train.packing import pack
from freehold.train.plan import RowShape, TrainingPlan, fitting_lora_plan
from freehold.train.sft import LoraTuning, adapter_spec
from freehold.weights.files import read_json
from freehold.weights.pack_file import source_fingerprint
"""placeholder"""
