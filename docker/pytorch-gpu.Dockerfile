# The image with PyTorch and without an inference engine: GPUs, our own engine in torch.
# Build at the root of the repository: docker build -f docker/pytorch-gpu.Dockerfile .
FROM deepjavalibrary/djl-serving:0.36.0-pytorch-gpu

COPY requirements.txt /tmp/requirements.txt
RUN python3 -m pip install --no-cache-dir -r /tmp/requirements.txt \
        "transformers>=4.44,<5" "accelerate>=0.30,<2" \
    && mkdir -p /home/djl/.cache /opt/ml/checkpoint \
    && chown djl:djl /home/djl/.cache

COPY handler /opt/ml/model/handler
COPY model.py /opt/ml/model/model.py
COPY serving.properties /opt/ml/model/serving.properties

# The checkpoint is mounted, or named by another OPTION_MODEL_ID. DJLServing ends when its worker has
# died, and sends many answers at a time. The image's own caches lie in /tmp and may be root's.
ENV OPTION_MODEL_ID=/opt/ml/checkpoint \
    SERVING_FAIL_FAST=true \
    JDK_JAVA_OPTIONS=-Djava.util.concurrent.ForkJoinPool.common.parallelism=64 \
    DJL_CACHE_DIR=/home/djl/.cache/djl \
    HF_HOME=/home/djl/.cache/huggingface

# by name: its number differs between the images
# hadolint ignore=DL3066
USER djl

# The start period is what loading and converting may take; an answer before ends it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m --retries=3 \
    CMD ["curl", "-fsS", "-o", "/dev/null", "http://127.0.0.1:8080/ping"]
