# syntax=docker/dockerfile:1
# The GPU stack on NVIDIA's PyTorch image; docs/containers.md says how to build, check and convert it.
#
#   docker build --build-arg NGC_TAG=<release>-py3 --tag megatron-oreal .
#
# torch, Transformer Engine and apex are the image's own, compiled by NVIDIA for each other: nothing here may replace
# them, and the build fails where something did.
ARG NGC_TAG

FROM nvcr.io/nvidia/pytorch:${NGC_TAG} AS base
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# What is kept: exact versions, for pip to obey besides the image's own constraint file.
COPY tools/image_packages.py /opt/megatron-oreal/image_packages.py
RUN python /opt/megatron-oreal/image_packages.py write /opt/megatron-oreal/kept.txt \
    && touch /etc/pip/constraint.txt \
    && cat /etc/pip/constraint.txt /opt/megatron-oreal/kept.txt > /opt/megatron-oreal/constraints.txt
ENV PIP_CONSTRAINT=/opt/megatron-oreal/constraints.txt

# vLLM's wheels are compiled against torch's own releases: this stage compiles it against the image's.
FROM base AS vllm
ARG VLLM_VERSION=0.26.0
ARG MAX_JOBS=16
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0+PTX"
WORKDIR /build/vllm
RUN git clone --depth 1 --branch "v${VLLM_VERSION}" https://github.com/vllm-project/vllm.git . \
    && python use_existing_torch.py \
    && pip install --no-cache-dir --requirement requirements/build.txt
RUN MAX_JOBS="${MAX_JOBS}" TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST}" \
    pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels .

FROM base AS final
COPY docker/requirements.txt /opt/megatron-oreal/requirements.txt
COPY --from=vllm /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl --requirement /opt/megatron-oreal/requirements.txt \
    && rm -r /wheels
WORKDIR /opt/megatron-oreal/source
COPY setup.py pyproject.toml ./
COPY megatron_oreal ./megatron_oreal
# No dependencies: they are above, and NVIDIA's pre-release of torch would not satisfy a bound that it does meet.
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && python /opt/megatron-oreal/image_packages.py check /opt/megatron-oreal/kept.txt \
    && pip freeze > /opt/megatron-oreal/freeze.txt

RUN useradd --create-home --uid 10001 --shell /bin/bash oreal
USER 10001
WORKDIR /workspace
ENV HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 OMP_NUM_THREADS=1
HEALTHCHECK --interval=1h --timeout=90s --start-period=2m CMD ["megatron-oreal", "doctor"]
CMD ["megatron-oreal", "doctor"]
