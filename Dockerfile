# syntax=docker/dockerfile:1
# The service in a container, on the processor, or with CUDA on NVIDIA's:
#
#     docker build --tag dragoman .
#     docker build --tag dragoman:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#
# PyTorch's builds on PyPI bring the libraries of CUDA with them; the host has the driver and NVIDIA's container toolkit.

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PATH=/opt/dragoman/bin:$PATH
RUN python -m venv /opt/dragoman
# The largest part by far, and the one that changes least.
RUN pip install --index-url ${TORCH_INDEX} 'torch==2.11.*'
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY streaming ./streaming
COPY wire ./wire
COPY models ./models
COPY client ./client
COPY training ./training
COPY benchmarks ./benchmarks
COPY metrics.py server.py asgi.py server_ray.py ./
RUN pip install '.[asgi]'

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --no-log-init --create-home dragoman
COPY --from=build /opt/dragoman /opt/dragoman
ENV PATH=/opt/dragoman/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/dragoman
EXPOSE 8765
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8765/healthz', timeout=4)"]
# Whoever reaches the container's address can reach the service: it does not start without a token.
ENTRYPOINT ["sh", "-c", ": \"${DRAGOMAN_TOKEN:?set it to a secret of your own}\" && exec dragoman serve --host 0.0.0.0 --port 8765 \"$@\"", "dragoman"]
CMD ["--asgi"]
