# The image of 2023 with FasterTransformer. It runs as root: its mpirun is made for that, and the
# wheel writes the converted weights beside the checkpoint.
# Build at the root of the repository: docker build -f docker/fastertransformer.Dockerfile .
FROM deepjavalibrary/djl-serving:0.23.0-fastertransformer

COPY requirements.txt /tmp/requirements.txt
RUN python3 -m pip install --no-cache-dir -r /tmp/requirements.txt \
    && mkdir -p /root/.cache /opt/ml/checkpoint

COPY handler /opt/ml/model/handler
COPY model.py /opt/ml/model/model.py
COPY docker/fastertransformer.properties /opt/ml/model/serving.properties

# The checkpoint is mounted, or named by another OPTION_MODEL_ID.
ENV OPTION_MODEL_ID=/opt/ml/checkpoint

# The start period is what loading and converting may take; an answer before ends it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=20m --retries=3 \
    CMD ["curl", "-fsS", "-o", "/dev/null", "http://127.0.0.1:8080/ping"]
