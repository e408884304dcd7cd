# The CPU image. Built from the root of the repository; see README.md.
#   docker build -t deepseek-optimizer .
#   docker run --rm deepseek-optimizer
# The wheel is built in a stage of its own, whose image has the compiler; what ships has none.
ARG PYTHON=3.12.12

FROM python:${PYTHON}-bookworm AS wheel
WORKDIR /source
# npm fetches the chat page's libraries, whose checksums are pinned; it stays in this stage.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends npm && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml CMakeLists.txt README.md LICENSE ./
COPY native native
COPY build_tools build_tools
COPY src src
# The context has no history to take the version from.
ARG VERSION=0.1.dev0
# A native part that does not compile is an error here, not a fallback.
RUN SETUPTOOLS_SCM_PRETEND_VERSION_FOR_DEEPSEEK_OPTIMIZER="${VERSION}" DSO_REQUIRE_NATIVE=1 \
    pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm
ARG TORCH=2.13.0
ARG TRANSFORMERS=5.24.0
# PyTorch's own index has the build without CUDA's libraries: a tenth of the size.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch==${TORCH}"
# The package's optional parts, such as "[longdoc,ray]" for replicas on a cluster of Ray.
ARG EXTRAS=[longdoc,serve]
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir "transformers==${TRANSFORMERS}" "$(echo /wheels/*.whl)${EXTRAS}"

# The probes that KubeRay gives the pods of examples/deploy/rayservice.yaml call wget.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends wget && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 dso
USER 1000
WORKDIR /home/dso
# Models lie under ~/.cache; made here, so that a volume mounted there belongs to the user.
RUN mkdir .cache
VOLUME ["/home/dso/.cache"]
ENTRYPOINT ["dso"]
CMD ["demo"]
