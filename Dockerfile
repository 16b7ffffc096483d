# docker build -t cluscomp . && docker run --rm -v "$PWD/outputs:/work/outputs" cluscomp model=hub model.id=ORG/NAME bits=3
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /source
RUN pip install --no-cache-dir --constraint /source/constraints.txt torch \
    && pip install --no-cache-dir --constraint /source/constraints.txt "/source[lora,tasks,wandb,tensorboard]"
WORKDIR /work
ENTRYPOINT ["cluscomp"]
