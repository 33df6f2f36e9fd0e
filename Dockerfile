# Every trained rung behind serve.py's page and API, on the CPU:
#     docker build -t ladder . && docker run --rm -p 127.0.0.1:8000:8000 ladder
# The image holds the models that are in runs/ when it is built. Others can be mounted in their place:
#     docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs:/app/runs" ladder
# Where there are none, three small ones are trained first, a minute or two. What follows the image's name are
# flags of serve.py; leave --port alone and publish 8000 as another: -p 127.0.0.1:80:8000. If others can reach
# the port, set a key: -e SERVE_API_KEY=...
FROM python:3.13-slim

WORKDIR /app
COPY requirements.txt requirements-serve.txt ./
# uv finds the build of PyTorch that has no code for GPUs and is a fraction of the other.
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --system --no-cache --torch-backend=cpu -r requirements-serve.txt \
    && useradd --create-home --uid 1000 learner \
    && chown 1000 /app
COPY --chown=1000 . .
USER 1000

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=300s CMD ["python", "-c", "import os; from urllib.request import Request, urlopen; urlopen(Request('http://127.0.0.1:8000/health', headers={'Authorization': 'Bearer ' + os.environ.get('SERVE_API_KEY', '')}), timeout=8)"]
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0"]
