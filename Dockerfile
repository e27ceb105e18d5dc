# sdjax's server. How it is started: docs/serve.md, "In a container".
#
#   docker build -t sdjax .                            # for CPUs
#   docker build -t sdjax --build-arg EXTRA=cuda13 .   # for NVIDIA GPUs; or cuda12, tpu

FROM python:3.13-slim

ARG EXTRA=

RUN --mount=type=bind,target=/source \
    pip install --no-cache-dir --root-user-action ignore "/source[serve${EXTRA:+,$EXTRA}]"

# What is written is open to all users, for those who start it as another one (--user)
RUN useradd --uid 1000 --create-home sdjax && \
    mkdir /models /loras /embeddings && \
    mkdir -m 777 /out /cache
ENV HF_HOME=/cache/huggingface JAX_COMPILATION_CACHE_DIR=/cache/jax
VOLUME ["/models", "/loras", "/embeddings", "/out", "/cache"]

USER sdjax
WORKDIR /out
EXPOSE 7860

# It answers when its first model is loaded, which may have to be downloaded
HEALTHCHECK --interval=30s --timeout=10s --start-period=15m --retries=3 CMD ["python", "-c", "\
from http.client import HTTPConnection as Server; \
server = Server('127.0.0.1', 7860, timeout=5); \
server.request('GET', '/health'); \
raise SystemExit(server.getresponse().status != 200)"]

ENTRYPOINT ["sdjax", "serve", "--host", "0.0.0.0", "--port", "7860", "--out", "/out", \
    "--models", "/models", "--loras", "/loras", "--embeddings", "/embeddings"]
# Without a key it does not start, unless it is told --no-auth in place of this
CMD ["--api-key-file", "/run/secrets/sdjax-key"]
