"""The table of instance types against SageMaker's own list of them."""

import pytest

from handler.errors import LoadError
from handler.packaging.instances import GIB, INSTANCES, find_instance

BY_HAND = {
    # AWS's page "Amazon EC2 Instance Types", read row by row
    "ml.g5.xlarge": (4, 16, 1, "A10G", 250),
    "ml.g5.12xlarge": (48, 192, 4, "A10G", 3800),
    "ml.g6e.48xlarge": (192, 1536, 8, "L40S", 7600),
    "ml.g4dn.12xlarge": (48, 192, 4, "T4", 900),
    "ml.p3.2xlarge": (8, 61, 1, "V100", None),
    "ml.p5.48xlarge": (192, 2048, 8, "H100", 30720),
    "ml.c5.9xlarge": (36, 72, 0, None, None),
    "ml.c7i.48xlarge": (192, 384, 0, None, None),
    "ml.m5d.12xlarge": (48, 192, 0, None, 1800),
    "ml.r6i.32xlarge": (128, 1024, 0, None, None),
}


def test_every_type_is_one_that_endpoints_offer():
    session = pytest.importorskip("botocore.session").Session()
    shape = session.get_service_model("sagemaker").shape_for("ProductionVariantInstanceType")
    assert set(INSTANCES) <= set(shape.enum)


@pytest.mark.parametrize("name", BY_HAND)
def test_facts(name):
    found = INSTANCES[name]
    disk = found.local_disk and found.local_disk // 10**9
    assert (found.vcpus, found.memory // GIB, found.gpus, found.gpu, disk) == BY_HAND[name]


def test_a_process_gets_less_of_a_gpu_than_its_name_says():
    for instance in INSTANCES.values():
        if instance.gpus:
            assert 0.9 < instance.gpu_memory / (instance.gpu_sold_as * 10**9) < 1.1
            assert instance.gpu_memory < instance.gpu_sold_as * GIB
            assert instance.compute_capability
            assert instance.gpu_bandwidth >= 300 * 10**9


def test_names_with_and_without_ml():
    assert find_instance("g5.xlarge") is find_instance("ml.g5.xlarge")


def test_an_unknown_name_is_told_with_the_nearest_and_the_families():
    with pytest.raises(
        LoadError, match=r"'ml.g5.xlarg' is known; did you mean ml.g5.xlarge\?.*g6e"
    ):
        find_instance("ml.g5.xlarg")
    with pytest.raises(LoadError, match=r"no instance type 'ml\.inf2\.xlarge' is known"):
        find_instance("ml.inf2.xlarge")
