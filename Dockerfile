# The image of rayjob.yaml: Ray and Python as pinned, and this project in them.
#   docker build -t REGISTRY/fbpc-ray:2.60.0 . && docker push REGISTRY/fbpc-ray:2.60.0
FROM rayproject/ray:2.60.0-py311-gpu
WORKDIR /home/ray/project
COPY --chown=ray:users constraints.txt pyproject.toml README.md LICENSE ./
COPY --chown=ray:users fbpc_ray fbpc_ray
COPY --chown=ray:users jobs jobs
RUN pip install --no-cache-dir --constraint constraints.txt .
