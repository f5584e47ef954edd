# Spatial-Mamba on CPUs, without this repository's tests and history:
#   docker build -t spatial-mamba-d2 .
#   docker run --rm -v "$PWD:/work" spatial-mamba-d2 predict --weights model.pth --input photos --output out --format coco
#   docker run --rm -p 8000:8000 -v "$PWD:/work" spatial-mamba-d2 serve --host 0.0.0.0 --weights model.pth
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ ninja-build \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# In layers of their own, which changes of the sources do not build again
RUN pip install --index-url https://download.pytorch.org/whl/cpu torch torchvision
RUN pip install "setuptools>=77,<81" wheel ninja
WORKDIR /src
COPY . .
# An error, rather than an image that runs slowly, if the operators cannot be compiled
RUN SMD2_BUILD_NATIVE=1 pip install --no-build-isolation ".[detection,segmentation,classification,serve]" \
    && python -m spatial_mamba_d2.system.install_detectron2

FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 user
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
USER user
WORKDIR /work
ENTRYPOINT ["spatial-mamba-d2"]
CMD ["--help"]
