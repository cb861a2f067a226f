"""requirements.txt of an archive: what the image lacks for this model."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT

from handler.config import Configuration
from handler.errors import LoadError
from handler.packaging.images import IMAGES, find_image
from handler.packaging.requirements import own_requirements, requirements_of, requirements_text


def names(image: str, model_type: str | None = "t5", **options: str) -> set[str]:
    lines = requirements_of(find_image(image), Configuration(**options), model_type)  # type: ignore[arg-type]
    return {line.split(">")[0] for line in lines}


@pytest.mark.parametrize("image", IMAGES)
def test_torch_is_never_asked_for(image: str) -> None:
    assert "torch" not in names(image, "bart", backend="transformers", dtype="fp16")


def test_what_runs_the_model_is_asked_for_where_it_is_not() -> None:
    assert "onnxruntime" in names("djl-cpu")
    assert "onnxruntime" not in names("lmi")
    assert "onnxruntime" in names("lmi", backend="onnxruntime")
    for image in ("djl-cpu", "pytorch-gpu"):
        assert "transformers" not in names(image)
        assert "transformers" in names(image, "bart")
        assert "transformers" in names(image, None)  # it may be any model
        assert "transformers" in names(image, backend="transformers")
    assert "transformers" not in names("lmi", "bart")  # which has its own


def test_the_repositorys_file_asks_for_what_the_table_says() -> None:
    text = (ROOT / "requirements.txt").read_text()
    lines = [line.split(";")[0] for line in text.splitlines() if not line.startswith("#")]
    image = find_image("djl-cpu")
    assert sorted(lines) == sorted([*image.requirements, *image.onnx])


def test_offline_only_the_wheels_count() -> None:
    text = requirements_text(find_image("lmi"), ["x>=1"], offline=True)
    assert text.splitlines()[1:] == ["--no-index", "--find-links requirements", "x>=1"]


def test_lines_of_a_folders_own_file(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text('# mine\n\nemoji>=2 # fun\nregex[x]==1; python_version > "3.8"\n')
    assert own_requirements(file, find_image("lmi")) == [
        "emoji>=2",
        'regex[x]==1; python_version > "3.8"',
    ]


@pytest.mark.parametrize("line", ["torch", "Torch==2.1", "torchvision>=1", "vllm"])
def test_lines_that_could_replace_what_is_built_for_the_image(tmp_path: Path, line: str) -> None:
    (tmp_path / "requirements.txt").write_text(f"{line}\n")
    with pytest.raises(LoadError, match=r"could replace the .* of image lmi"):
        own_requirements(tmp_path / "requirements.txt", find_image("lmi"))


@pytest.mark.parametrize("line", ["-e .", "--index-url http://x", "./wheels/x.whl", "x=1", "git+x"])
def test_lines_that_are_no_package_with_versions(tmp_path: Path, line: str) -> None:
    (tmp_path / "requirements.txt").write_text(f"{line}\n")
    with pytest.raises(LoadError, match="is not a package with versions"):
        own_requirements(tmp_path / "requirements.txt", find_image("lmi"))
