"""The table of container images."""

from __future__ import annotations

import pytest

from handler.errors import LoadError
from handler.packaging.images import IMAGES, find_image


@pytest.mark.parametrize("image", IMAGES.values(), ids=lambda image: image.name)
def test_nothing_that_an_image_installs_replaces_its_torch(image) -> None:
    needs = (*image.requirements, *image.onnx, *image.transformers_requirements)
    assert not [line for line in needs if line.startswith("torch")]


def test_an_address_in_aws() -> None:
    assert find_image("djl-cpu").sagemaker_uri("eu-west-1") == (
        "763104351884.dkr.ecr.eu-west-1.amazonaws.com/djl-inference:0.36.0-cpu-full"
    )
    assert find_image("lmi").sagemaker_uri("cn-north-1") == (
        "727897471807.dkr.ecr.cn-north-1.amazonaws.com.cn/djl-inference:0.36.0-lmi27.0.0-cu130"
    )


def test_what_cannot_be_found_is_told_with_what_can() -> None:
    with pytest.raises(LoadError, match="'djl-gpu' is not known, allowed are lmi, djl-cpu, "):
        find_image("djl-gpu")
    with pytest.raises(LoadError, match="did you mean eu-west-1"):
        find_image("lmi").sagemaker_uri("eu-west-11")
    with pytest.raises(LoadError, match="not in SageMaker's registries; those of lmi, djl-cpu, "):
        find_image("pytorch-gpu").sagemaker_uri("us-east-1")
