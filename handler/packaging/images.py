"""The container images of DJLServing: what is in them, what they lack, their address in AWS."""

from __future__ import annotations

from dataclasses import dataclass

from handler.errors import LoadError, nearest, shown

# Ranges, not single versions: an image's own version stays wherever it fits, since replacing, say,
# tokenizers would break the image's transformers. Never torch: the image's is built for its GPUs.
EVERYWHERE = (
    "filelock>=3.4,<5",
    "huggingface_hub>=0.14,<2",
    "numpy>=1.21,<3",
    "safetensors>=0.3.1,<1",
    "sentencepiece>=0.1.99,<0.3",
    "tokenizers>=0.13.2,<1",
)
GUIDED = ("llguidance>=1.9,<2",)
ONNX = ("onnx>=1.16,<2", "onnxruntime>=1.23,<2")
# transformers 5 wants a torch of 2.6 and newer
_TRANSFORMERS_4 = ("transformers>=4.44,<5", "accelerate>=0.30,<2")
_TRANSFORMERS = ("transformers>=4.44,<6", "accelerate>=0.30,<2")


@dataclass(frozen=True)
class Image:
    """A container image with DJLServing in it, for x86-64.

    reference: as docker pulls it. sagemaker: repository:tag in AWS's registries, or None.
    djl_version, python, glibc, torch, transformers: the versions that it holds; torch and
    transformers None where it has none. requirements: what every model needs besides. onnx: what
    the CPU engine needs besides, transformers_requirements what backend=transformers does.
    """

    name: str
    reference: str
    sagemaker: str | None
    djl_version: str
    python: str
    glibc: str
    torch: str | None
    transformers: str | None
    gpu: bool
    requirements: tuple[str, ...]
    onnx: tuple[str, ...] = ()
    transformers_requirements: tuple[str, ...] = ()

    def sagemaker_uri(self, region: str) -> str:
        """Where SageMaker pulls it in ``region``. Raises LoadError where it cannot."""
        if self.sagemaker is None:
            there = ", ".join(image.name for image in IMAGES.values() if image.sagemaker)
            raise LoadError(
                f"image {self.name} is not in SageMaker's registries; those of {there} are, "
                f"or push {self.reference} to a registry of your own"
            )
        account = _ACCOUNTS.get(region)
        if account is None:
            hint = nearest(region, _ACCOUNTS)
            raise LoadError(
                f"region {shown(region)} has no registry of these images that is known here"
                + (f"; did you mean {hint}?" if hint else f"; known are {', '.join(_ACCOUNTS)}")
            )
        domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        return f"{account}.dkr.ecr.{region}.{domain}/{self.sagemaker}"


def find_image(name: str) -> Image:
    """The image of that name. Raises LoadError."""
    if name not in IMAGES:
        hint = nearest(name, IMAGES)
        raise LoadError(
            f"image {shown(name)} is not known, allowed are {', '.join(IMAGES)}"
            + (f"; did you mean {hint}?" if hint else "")
        )
    return IMAGES[name]


# Read from the images' Dockerfiles in the DJLServing sources, and from AWS's list of its images.
IMAGES = {
    image.name: image
    for image in (
        Image(
            name="lmi",
            reference="deepjavalibrary/djl-serving:0.36.0-lmi",
            sagemaker="djl-inference:0.36.0-lmi27.0.0-cu130",
            djl_version="0.36.0",
            python="3.12",
            glibc="2.39",
            torch="2.11.0",
            transformers="5.9.0",
            gpu=True,
            requirements=(*EVERYWHERE, *GUIDED),
            onnx=ONNX,
        ),
        # not djl-serving:0.36.0, which has no Python
        Image(
            name="djl-cpu",
            reference="deepjavalibrary/djl-serving:0.36.0-cpu-full",
            sagemaker="djl-inference:0.36.0-cpu-full",
            djl_version="0.36.0",
            python="3.11",
            glibc="2.35",
            torch="2.7.1",
            transformers=None,
            gpu=False,
            requirements=(*EVERYWHERE, *GUIDED),
            onnx=ONNX,
            transformers_requirements=_TRANSFORMERS,
        ),
        Image(
            name="pytorch-gpu",
            reference="deepjavalibrary/djl-serving:0.36.0-pytorch-gpu",
            sagemaker=None,
            djl_version="0.36.0",
            python="3.12",
            glibc="2.35",
            torch="2.5.1",
            transformers=None,
            gpu=True,
            requirements=(*EVERYWHERE, *GUIDED),
            onnx=ONNX,
            transformers_requirements=_TRANSFORMERS_4,
        ),
        Image(
            name="fastertransformer",
            reference="deepjavalibrary/djl-serving:0.23.0-fastertransformer",
            sagemaker="djl-inference:0.23.0-fastertransformer5.3.0-cu118",
            djl_version="0.23.0",
            python="3.9",
            glibc="2.31",
            torch="1.13.1",
            transformers="4.30.1",
            gpu=True,
            requirements=EVERYWHERE,
        ),
    )
}

# The registries of AWS's Deep Learning Containers, by region.
_ACCOUNTS = {
    **dict.fromkeys(
        (
            *("us-east-1", "us-east-2", "us-west-1", "us-west-2", "ca-central-1", "sa-east-1"),
            *("eu-central-1", "eu-north-1", "eu-west-1", "eu-west-2", "eu-west-3"),
            *("ap-northeast-1", "ap-northeast-2", "ap-south-1"),
            *("ap-southeast-1", "ap-southeast-2"),
        ),
        "763104351884",
    ),
    "af-south-1": "626614931356",
    "ap-east-1": "871362719292",
    "ap-east-2": "975050140332",
    "ap-northeast-3": "364406365360",
    "ap-south-2": "772153158452",
    "ap-southeast-3": "907027046896",
    "ap-southeast-4": "457447274322",
    "ap-southeast-5": "550225433462",
    "ap-southeast-6": "633930458069",
    "ap-southeast-7": "590183813437",
    "ca-west-1": "204538143572",
    "cn-north-1": "727897471807",
    "cn-northwest-1": "727897471807",
    "eu-central-2": "380420809688",
    "eu-south-1": "692866216735",
    "eu-south-2": "503227376785",
    "il-central-1": "780543022126",
    "me-central-1": "914824155844",
    "me-south-1": "217643126080",
    "mx-central-1": "637423239942",
    "us-gov-east-1": "446045086412",
    "us-gov-west-1": "442386744353",
}
