import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import dynrank_ds.tensorfile
from dynrank_ds.tensorfile import (
    TensorEntry,
    TensorFileError,
    TensorFileReader,
    TensorFileWriter,
    file_sha256,
)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "flags": torch.tensor(
            [True, False, True]
        ),  # 3 bytes: what follows would be misaligned if order were kept
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "single": torch.randn(4, 3).T,  # not contiguous
        "scalar": torch.tensor(7, dtype=torch.int64),
        "eighth": torch.randn(3).to(torch.float8_e4m3fn),
    }


def entries_of(tensors: dict[str, torch.Tensor]) -> list[TensorEntry]:
    return [TensorEntry(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]


def write_all(path, tensors, metadata=None) -> None:
    with TensorFileWriter(path, entries_of(tensors), metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def test_safetensors_reads_what_was_written(tmp_path, tensors):
    path = tmp_path / "all.safetensors"
    write_all(path, tensors, {"step": "3"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "3"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert torch.equal(found.float(), tensor.float())


def test_every_tensor_is_aligned_to_its_elements(tmp_path, tensors):
    path = tmp_path / "all.safetensors"
    write_all(path, tensors)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_reader_reads_files_of_the_safetensors_library(tmp_path, tensors):
    path = tmp_path / "theirs.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"a": "b"})
    with TensorFileReader(path) as reader:
        assert reader.metadata == {"a": "b"}
        assert set(reader.entries) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(reader.read(name).float(), tensor.float())


def test_order_of_writing_is_free(tmp_path):
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    with TensorFileWriter(tmp_path / "f", entries_of(tensors)) as writer:
        writer.write("b", tensors["b"])
        writer.write("a", tensors["a"])
    with TensorFileReader(tmp_path / "f") as reader:
        assert torch.equal(reader.read("a"), tensors["a"])


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.ones(2, dtype=torch.float16), torch.ones(1, 2)])
def test_a_tensor_unlike_its_announcement_is_refused(tmp_path, wrong):
    with (
        pytest.raises(ValueError, match="announced was torch"),
        TensorFileWriter(tmp_path / "f", [TensorEntry("a", torch.float32, (2,))]) as writer,
    ):
        writer.write("a", wrong)
    assert not (tmp_path / "f").exists()


def test_an_empty_tensor_is_refused_before_a_file_exists(tmp_path):
    with pytest.raises(ValueError, match="no elements"):
        TensorFileWriter(tmp_path / "f", [TensorEntry("a", torch.float32, (0, 4))])
    assert not (tmp_path / "f").exists()


def test_missing_and_repeated_tensors_are_refused(tmp_path):
    entries = [TensorEntry("a", torch.float32, (2,)), TensorEntry("b", torch.float32, (2,))]
    with (
        pytest.raises(ValueError, match=r"never written, e\.g\. b"),
        TensorFileWriter(tmp_path / "f", entries) as writer,
    ):
        writer.write("a", torch.ones(2))
    assert not (tmp_path / "f").exists()
    with (
        pytest.raises(ValueError, match="already written"),
        TensorFileWriter(tmp_path / "f", entries) as writer,
    ):
        writer.write("a", torch.ones(2))
        writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="announced twice"):
        TensorFileWriter(tmp_path / "f", [entries[0], entries[0]])


def test_a_damaged_file_is_reported_in_one_sentence(tmp_path, tensors):
    path = tmp_path / "f"
    write_all(path, tensors)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(TensorFileError, match="cut short"):
        TensorFileReader(path)
    path.write_bytes(whole[:20])
    with pytest.raises(TensorFileError, match="not a readable safetensors file"):
        TensorFileReader(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(TensorFileError, match="not a readable safetensors file"):
        TensorFileReader(path)
    with pytest.raises(TensorFileError, match="cannot be read"):
        TensorFileReader(tmp_path / "nowhere")


def test_checksum_is_that_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_tensor_is_copied_from_another_file_in_pieces(tmp_path, tensors, monkeypatch):
    monkeypatch.setattr(dynrank_ds.tensorfile, "_PIECE_BYTES", 7)
    write_all(tmp_path / "first", tensors)
    with (
        TensorFileReader(tmp_path / "first") as reader,
        TensorFileWriter(tmp_path / "second", entries_of(tensors)) as writer,
    ):
        for name in tensors:
            writer.copy(name, reader)
        with pytest.raises(ValueError, match="is already written"):
            writer.copy("half", reader)
    assert (tmp_path / "second").read_bytes() == (tmp_path / "first").read_bytes()
