"""The one reader of torch_dist checkpoints: what it refuses, and how."""

from __future__ import annotations

import argparse
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_mile.errors import MileError
from megatron_mile.integration.cost_files import read_matrix
from megatron_mile.integration.torch_dist import Reader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
WEIGHT = "output_layer.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An iteration's folder with a tensor and an object."""
    state = {WEIGHT: torch.randn(5, 3), "note": {"a": 1}, "tail": torch.ones(1000)}
    dcp.save(state, checkpoint_id=tmp_path / "it", no_dist=True)
    (tmp_path / "it" / "metadata.json").write_text("{}")
    return tmp_path / "it"


def test_reader_gives_tensors_and_objects(folder: Path) -> None:
    reader = Reader(folder)
    assert reader.tensor(WEIGHT).shape == (5, 3)
    (key,) = reader.objects
    assert reader.object(key) == 1


# Harmless classes are refused too: the list is what checkpoints need, and no more.
@pytest.mark.parametrize(
    "content", [argparse.Namespace(a=1), os.getcwd, torch.load, torch.ones(1), Path, eval]
)
def test_metadata_may_name_no_other_class(content: object, folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(OrderedDict(a=content)))
    with pytest.raises(pickle.UnpicklingError, match=r"^it asks for \S+, which is refused$"):
        Reader(folder)


def test_a_cut_off_tensor_is_an_error_of_the_usual_kind(folder: Path) -> None:
    # torch reports it as a BaseException, which no `except Exception` would see.
    for file in folder.glob("*.distcp"):
        os.truncate(file, 40)
    with pytest.raises(MileError, match="cannot be read: "):
        read_matrix(str(folder))
