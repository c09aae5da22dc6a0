# The server. torch from PyPI brings CUDA along; for a CPU, an image of a tenth of the size:
#   docker build --build-arg TORCH_INDEX_URL=<PyTorch's index of CPU wheels> -t manylora .
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# torch first and by itself: it is the largest layer, and the sources change more often.
ARG TORCH_INDEX_URL
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch>=2.9,<2.14"
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY src src
RUN /venv/bin/pip install --no-cache-dir ".[server,remote]"

FROM python:3.11-slim
# The native kernels need OpenMP's library, which came along with g++ in the first stage and is no part of this one.
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 manylora
COPY --from=build /venv /venv
USER manylora
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8000
# The model may take minutes to load; until then nobody listens. With another --port, give another check.
HEALTHCHECK --start-period=10m --interval=15s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# SIGTERM drains; `docker stop` waits 10 s unless told: docker run --stop-timeout 40.
STOPSIGNAL SIGTERM
ENTRYPOINT ["manylora"]
CMD ["serve", "/model", "--adapters", "/adapters", "--host", "0.0.0.0", "--log-format", "json"]
