"""serve.py: what it answers is what the rungs write, whoever else asks; bad requests, limits, a client."""

import contextlib
import copy
import json
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import takewhile
from unittest.mock import patch

import httpx
import openai
import pytest
import torch
import uvicorn
from conftest import command, run_here, tiny_flags
from test_command_line import refused
from test_rag import save_model

import serve
import v7_quantize as v7
import v8_lora as v8
import v9_rlhf as v9
from bpe_tokenizer import BPETokenizer

TEXT = "".join(f"{name}:\nGood morrow, cousin, {i}.\n\n" for i in range(80) for name in ("ROMEO", "JULIET"))
OLD = serve.RUNGS[:7]  # trained on TEXT; v8 and v9 have random weights


def make_runs(folder):
    """A folder of small models, one of each rung, and two that cannot be served."""
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    for rung in OLD:
        flags = tiny_flags(sys.modules.get(rung) or __import__(rung), block_size=16)
        process = run_here(rung, *flags, "--data=text.txt", f"--out_dir=runs/{rung}", cwd=folder)
        assert process.returncode == 0, process.stderr
    flags = ("--base=runs/v6_amp_ddp", "--quantize=none", "--out_dir=runs/v7_quantize", "--data=text.txt")
    process = run_here("v7_quantize", *flags, cwd=folder)
    assert process.returncode == 0, process.stderr
    save_model(folder / "runs" / "v8_lora")
    save_model(folder / "runs" / "v9_rlhf", v9, seed=2)
    (folder / "runs" / "cut").mkdir()
    (folder / "runs" / "cut" / "checkpoint.pt").write_bytes(b"PK no model")
    (folder / "runs" / "other").mkdir()
    checkpoint = torch.load(folder / "runs" / "v8_lora" / "checkpoint.pt", weights_only=True)
    torch.save(checkpoint | {"version": "antigravity"}, folder / "runs" / "other" / "checkpoint.pt")
    return folder / "runs"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the models."""
    return make_runs(tmp_path_factory.mktemp("served"))


class Running:
    """A server in a thread."""

    def __init__(self, runs, **changes):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.config = serve.Config(runs=str(runs), port=port, **changes)
        self.models = serve.find_models(self.config)
        app = serve.make_app(self.models, self.config)
        self.server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{port}"
        while not self.server.started:
            time.sleep(0.01)
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=serve.KEY or "none", max_retries=0)

    def stop(self):
        self.http.close()
        self.openai.close()
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def running(runs):
    """A server of all models."""
    server = Running(runs, n_rows=4, max_tokens=200)
    yield server
    server.stop()


@pytest.fixture
def start(runs):
    """Start servers of other settings, which end with the test."""
    servers = []

    def start_one(**changes):
        servers.append(Running(runs, **changes))
        return servers[-1]

    yield start_one
    for server in servers:
        server.stop()


def written_by_the_rung(runs, name, prompt, n):
    """What a rung itself adds to a prompt, greedy."""
    rung = __import__(name)
    if name in serve.CHATTING:
        checkpoint, config = rung.load_checkpoint("sample", {}, str(runs / name))
    elif name == "v7_quantize":
        checkpoint, config = rung.load_checkpoint("sample", {}, str(runs / name))
    else:
        checkpoint, config = rung.load_checkpoint("sample", {"out_dir": str(runs / name)})
    config = replace(config, greedy=True, max_new_tokens=n)
    tokenizer = v8.make_tokenizer(checkpoint["vocab"])
    if name == "v7_quantize":
        model = v7.load_model(checkpoint["model"], config, "cpu")
    else:
        model = rung.LanguageModel(config, len(tokenizer.vocab))
        rung.load_weights(model, checkpoint["model"])
    ids = tokenizer.encode(prompt)
    if name in serve.CHATTING:
        special = {*tokenizer.special_tokens.values()}  # here each of them ends a text
        new = takewhile(lambda i: i not in special, rung.generate(model.eval(), [ids], config, None)[0])
    else:
        new = rung.generate(model, torch.tensor([ids]), config)[0].tolist()[len(ids) :]
    return tokenizer.decode(list(new))


# ----------------------------------------------- answers -----------------------------------------------


@pytest.mark.parametrize("name", serve.RUNGS)
def test_each_rung_writes_here_what_it_writes_itself(name, runs, running):
    asked = running.openai.completions.create(model=name, prompt="ROMEO:\nGood", max_tokens=10, temperature=0)
    assert asked.choices[0].text == written_by_the_rung(runs, name, "ROMEO:\nGood", 10) != ""
    assert asked.choices[0].finish_reason == "length" and asked.usage.completion_tokens == 10
    assert asked.model == name and asked.usage.total_tokens == asked.usage.prompt_tokens + 10


@pytest.mark.parametrize("name", serve.RUNGS)
def test_a_stream_is_the_same_text_in_pieces(name, running):
    asked = dict(model=name, prompt="ROMEO:\n", max_tokens=150, seed=5, temperature=0.9, top_p=0.95)
    whole = running.openai.completions.create(**asked)
    chunks = list(running.openai.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    assert (len(chunks) > 1 or reasons == ["stop"]) and len({chunk.id for chunk in chunks}) == 1
    other = running.openai.completions.create(**asked | {"seed": 6})
    assert other.choices[0].text != whole.choices[0].text


def test_many_at_once_get_what_each_would_get_alone(running):
    prompts = [
        f"{name}:\n{word}" for name in ("ROMEO", "JULIET") for word in ("Good", "morrow", "c", "in, 3", "")
    ]
    asked = [
        dict(model=name, prompt=prompt, max_tokens=20 + 5 * i, temperature=i % 2, seed=i)
        for name in ("v6_amp_ddp", "v5_gpt2", "v2_attention")
        for i, prompt in enumerate(prompts)
    ]

    def ask(request):
        return running.openai.completions.create(**request).choices[0].text

    alone = [ask(request) for request in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(ask, asked)) == alone


def test_several_prompts_and_several_answers_have_their_places(running):
    asked = dict(model="v6_amp_ddp", max_tokens=8, seed=3)
    found = running.openai.completions.create(prompt=["ROMEO", "JULIET:\n"], n=2, **asked)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    for i, choice in enumerate(found.choices):
        one = asked | {"seed": 3 + i, "prompt": ["ROMEO", "JULIET:\n"][i // 2]}
        assert choice.text == running.openai.completions.create(**one).choices[0].text
    streamed = {}
    for chunk in running.openai.completions.create(prompt=["ROMEO", "JULIET:\n"], n=2, stream=True, **asked):
        streamed[chunk.choices[0].index] = streamed.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert streamed == {choice.index: choice.text for choice in found.choices}
    assert found.usage.completion_tokens == 32


def test_a_conversation_is_encoded_by_the_template_and_ends_by_itself(runs, running):
    turns = [("context", "ROMEO:\nGood morrow"), ("user", "Who says: Good?")]
    model = running.models["v8_lora"]
    assert model.encode_turns(turns) == v8.encode_prompt(turns, model.tokenizer)
    messages = [{"role": "system", "content": turns[0][1]}]
    messages.append({"role": "user", "content": [{"type": "text", "text": turns[1][1]}]})
    asked = dict(model="v8_lora", messages=messages, temperature=0, max_completion_tokens=30)
    found = running.openai.chat.completions.create(**asked)
    checkpoint, config = v8.load_checkpoint("sample", {}, str(runs / "v8_lora"))
    model = v8.LanguageModel(config, config.vocab_size)
    model.load_state_dict(checkpoint["model"])
    tokenizer = v8.make_tokenizer(checkpoint["vocab"])
    end, config = tokenizer.special_tokens["<|endoftext|>"], replace(config, greedy=True, max_new_tokens=30)
    expected = v8.generate(model, [v8.encode_prompt(turns, tokenizer)], config, end)[0]
    special = {*tokenizer.special_tokens.values()}
    said = [*takewhile(lambda i: i not in special, expected)]  # here each of them ends a text
    assert found.choices[0].message.content == tokenizer.decode(said)
    assert found.choices[0].finish_reason == ("stop" if special & {*expected} else "length")
    chunks = list(
        running.openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage == found.usage
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == found.choices[0].message.content


def test_special_tokens_in_a_text_are_plain_text(running, start):
    for text in ("<|endoftext|>", "a<|assistant|>b"):  # this vocabulary has no "<": refused, not cut
        with pytest.raises(openai.BadRequestError, match="lacks the character"):
            running.openai.completions.create(model="v8_lora", prompt=text)
    model = start().models["v8_lora"]
    model.tokenizer = BPETokenizer.train("a good word, a bad word " * 9, 270, v8.SPECIAL_TOKENS)
    ids = model.encode_turns([("user", "a<|endoftext|><|assistant|>b")])
    special = model.tokenizer.special_tokens
    assert [i for i in ids if i in special.values()] == [special["<|user|>"], special["<|assistant|>"]]


class Scripted:
    """An engine that says what it is told."""

    def __init__(self, ids):
        self.ids, self.sequences = ids, [None]

    def add(self, ids, config, stop=None):
        self.sequences[0] = types.SimpleNamespace(n_left=config.max_new_tokens, at=0)
        return 0

    def remove(self, row):
        self.sequences[row] = None

    def step(self):
        time.sleep(0.002)
        sequence = self.sequences[0]
        new = self.ids[sequence.at % len(self.ids)]
        sequence.at, sequence.n_left = sequence.at + 1, sequence.n_left - 1
        return {0: new}


class Bytes:
    """A tokenizer of bytes."""

    special_tokens = types.MappingProxyType({})
    vocab = tuple(bytes([i]) for i in range(256))

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


def scripted(server, text):
    """Let a model of a server say a text over and over."""
    model = server.models["v6_amp_ddp"]
    model.engine, model.tokenizer, model.ends = Scripted(list(text.encode())), Bytes(), {0}
    return dict(model="v6_amp_ddp", prompt="x")


def test_half_characters_and_half_stops_are_held_back(start):
    server = start()
    asked = scripted(server, "né 界🙂 END of it ")
    whole = server.openai.completions.create(**asked, max_tokens=11).choices[0].text
    assert whole == "né 界🙂"
    for n, text in {1: "n", 2: "n\ufffd", 3: "né", 5: "né \ufffd", 7: "né 界", 8: "né 界\ufffd"}.items():
        chunks = server.openai.completions.create(**asked, max_tokens=n, stream=True)
        pieces = [chunk.choices[0].text for chunk in chunks]
        assert "\ufffd" not in "".join(pieces[:-1]) and "".join(pieces) == text
    found = server.openai.completions.create(**asked, max_tokens=60, stop=["END", "zzz"])
    assert found.choices[0].text == "né 界🙂 " and found.choices[0].finish_reason == "stop"
    chunks = list(
        server.openai.completions.create(
            **asked, max_tokens=60, stop=[" END of it né 界🙃", "it"], stream=True
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == "né 界🙂 END of "
    assert chunks[-1].choices[0].finish_reason == "stop"
    found = server.openai.completions.create(**asked, max_tokens=13, stop="END")
    assert found.choices[0].text == "né 界🙂 E" and found.choices[0].finish_reason == "length"
    asked = scripted(server, "the end\0and more")
    found = server.openai.completions.create(**asked, max_tokens=60)
    assert found.choices[0].text == "the end" and found.choices[0].finish_reason == "stop"


@contextlib.contextmanager
def process(runs):
    """The server as a process of its own: (it, a client)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [*command("serve"), f"--runs={runs}", f"--port={port}"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, encoding="utf-8") as server:
        try:
            while "serves" not in (line := server.stdout.readline()):
                assert line or server.poll() is None, "it has ended"
            url = f"http://127.0.0.1:{port}/v1"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=5) as client:
                yield server, client
        finally:
            server.kill()


def test_after_a_kill_it_answers_the_same_with_the_same_seed(runs):
    asked = [
        dict(model=name, prompt="ROMEO:\n", max_tokens=30, seed=4) for name in ("v2_attention", "v9_rlhf")
    ]
    answers = []
    for _ in range(2):
        with process(runs) as (server, client):
            stream = client.completions.create(model="v6_amp_ddp", prompt="R", max_tokens=900, stream=True)
            answers.append([client.completions.create(**one).choices[0].text for one in asked])
            next(iter(stream))
            server.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
            with pytest.raises((openai.APIError, httpx.HTTPError)):
                list(stream)
    assert answers[0] == answers[1] and all(answers[0])


# ----------------------------------------------- limits -----------------------------------------------


def test_a_full_queue_answers_429_and_goes_on(start):
    server = start(max_waiting=3)
    asked = scripted(server, "abc") | {"max_tokens": 200}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: server.http.post("/v1/completions", json=asked), range(12)))
    codes = [answer.status_code for answer in answers]
    assert codes.count(200) >= 4 and codes.count(429) >= 1 and set(codes) == {200, 429}
    full = next(answer for answer in answers if answer.status_code == 429)
    assert full.headers["retry-after"] == "1" and full.json()["error"]["code"] == "overloaded"
    assert {len(answer.json()["choices"][0]["text"]) for answer in answers if answer.status_code == 200} == {
        200
    }
    assert server.http.post("/v1/completions", json=asked).status_code == 200


def test_a_client_that_leaves_frees_its_place(start, capfd):
    server = start(max_tokens=100_000)
    asked = scripted(server, "abc") | {"max_tokens": 100_000}
    model = server.models["v6_amp_ddp"]
    for stream in (True, False):
        with contextlib.suppress(httpx.ReadTimeout), httpx.Client(base_url=server.url, timeout=1.0) as client:
            with client.stream("POST", "/v1/completions", json=asked | {"stream": stream}) as answer:
                for i, _ in enumerate(answer.iter_raw()):
                    if i > 3:
                        break
        start_time = time.monotonic()
        while model.working and time.monotonic() - start_time < 10:
            time.sleep(0.05)
        assert not model.working and model.engine.sequences == [None]
    assert server.http.post("/v1/completions", json=asked | {"max_tokens": 5}).status_code == 200
    assert 'status="499"' in server.http.get("/metrics").text
    assert "Traceback" not in capfd.readouterr().err


def test_who_has_left_waits_no_more(runs, monkeypatch):
    monkeypatch.setattr(serve.Worker, "start", lambda self: None)  # nobody draws
    model = serve.Served("model", runs / "v6_amp_ddp", serve.Config(max_waiting=2))
    worker = serve.Worker([model])
    jobs = [serve.Job(model, [1], v8.Config(), None) for _ in range(3)]
    worker.submit(jobs[:1])
    worker.submit(jobs[1:2])
    with pytest.raises(serve.Refused, match="2 texts wait"):
        worker.submit(jobs[2:])
    jobs[0].gone = True
    worker.submit(jobs[2:])
    assert model.n_waiting == 2 and model.take() == jobs[1:] and model.n_waiting == 0
    with pytest.raises(serve.Refused, match="at most 2 texts can be asked for at once, not 3"):
        worker.submit(jobs)


def test_many_texts_of_one_request_do_not_lock_others_out(start):
    server = start()
    asked = scripted(server, "abc")
    with ThreadPoolExecutor(2) as pool:
        many = pool.submit(server.http.post, "/v1/completions", json=asked | {"n": 16, "max_tokens": 100})
        time.sleep(0.3)
        assert server.http.post("/v1/completions", json=asked | {"max_tokens": 2}).status_code == 200
        assert not many.done()
        assert many.result().status_code == 200


def test_extreme_values_harm_nobody_else(start):
    server = start()
    fine = dict(model="v6_amp_ddp", prompt="ROMEO", max_tokens=150)
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(server.http.post, "/v1/completions", json=fine) for _ in range(3)]
        for change in ({"top_p": 1e-46}, {"temperature": 1e-300}, {"seed": -(2**40)}):
            assert server.http.post("/v1/completions", json=fine | change).status_code == 200
        long = [c * 150 + "#" for c in "RJ:x"]
        begin = time.monotonic()
        assert server.http.post("/v1/completions", json=fine | {"stop": long}).status_code == 200
        assert time.monotonic() - begin < 5
        assert {other.result().status_code for other in others} == {200}


def test_a_request_ends_after_max_seconds(start):
    server = start(max_seconds=0.2, max_tokens=100_000)
    asked = scripted(server, "abc") | {"max_tokens": 100_000}
    begin = time.monotonic()
    found = server.openai.completions.create(**asked)
    assert time.monotonic() - begin < 5 and found.choices[0].finish_reason == "length"
    assert 10 < found.usage.completion_tokens < 1000


def test_a_bug_in_a_model_is_told_and_the_server_goes_on(start, capfd):
    server = start()
    asked = scripted(server, "abc")
    model = server.models["v6_amp_ddp"]
    step, model.engine.step = model.engine.step, lambda: 1 / 0
    answer = server.http.post("/v1/completions", json=asked)
    assert answer.status_code == 500 and "the model has failed" in answer.json()["error"]["message"]
    streamed = server.http.post("/v1/completions", json=asked | {"stream": True}).text
    assert "the model has failed" in streamed and streamed.endswith("data: [DONE]\n\n")
    model.engine.step = step
    assert server.http.post("/v1/completions", json=asked).status_code == 200
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_hosts_keys_and_sizes_are_looked_at_first(start, monkeypatch):
    monkeypatch.setattr(serve, "KEY", "secret")
    server = start(names="ladder.example", max_body=500)
    for path in ("/health", "/metrics", "/v1/models", "/nothing"):
        assert server.http.get(path).status_code == 401
        assert server.http.get(path, headers={"authorization": "Bearer wrong"}).status_code == 401
    key = {"authorization": "Bearer secret"}
    assert server.http.get("/health", headers=key).json()["status"] == "ok"
    assert [model.id for model in server.openai.models.list()] == list(serve.RUNGS)
    for host, code in {
        "evil.example": 421,
        "localhost:1": 200,
        "ladder.example": 200,
        "LADDER.example:8000": 200,
        "192.168.1.5": 200,  # no name: nobody can have made it up
        "[::1]:80": 200,
    }.items():
        assert server.http.get("/health", headers=key | {"host": host}).status_code == code
    own = server.url.removeprefix("http://")
    origins = {f"http://{own}": 200, "http://localhost:3000": 403, "https://evil.example": 403}
    for origin, code in origins.items():
        assert server.http.get("/health", headers=key | {"origin": origin}).status_code == code
    big = json.dumps({"model": "v0_bigram", "prompt": "a" * 600})
    json_type = {"content-type": "application/json"}
    assert server.http.post("/v1/completions", content=big, headers=key | json_type).status_code == 413
    pieces = (big[i : i + 100].encode() for i in range(0, len(big), 100))  # without a length
    assert server.http.post("/v1/completions", content=pieces, headers=key | json_type).status_code == 413


def test_health_metrics_and_models(running):
    before = running.http.get("/metrics").text
    running.openai.completions.create(model="v0_bigram", prompt="ROMEO", max_tokens=7)
    after = running.http.get("/metrics").text

    def value(text, name):
        return sum(float(line.split()[1]) for line in text.splitlines() if line.startswith(name))

    for name, more in {"tokens_total": 7, "prompt_tokens_total": 5, "first_token_seconds_count": 1}.items():
        label = f'{name}{{model="v0_bigram"}}'
        assert value(after, label) == value(before, label) + more
    assert value(after, 'requests_total{route="/v1/completions",status="200"}') >= 1
    assert running.http.get("/health").json() == {"status": "ok", "models": len(serve.RUNGS)}
    found = running.openai.models.retrieve("v8_lora")
    assert found.object == "model" and found.owned_by == "v8_lora"
    assert {model.id for model in running.openai.models.list()} == set(serve.RUNGS)


# ------------------------------------------------ page ------------------------------------------------


def test_the_page_comes_from_this_server_alone(running):
    page = running.http.get("/")
    assert page.status_code == 200 and "The ladder" in page.text
    gradio = ("upload", "file=/etc/passwd", "info", "config", "api_info")
    for path in ("/nothing", "/docs", "/openapi.json", *(f"/gradio_api/{path}" for path in gradio)):
        assert running.http.get(path).status_code == 404, path
        assert running.http.post(path).status_code in (404, 405), path
    links = re.findall(r'(?:src|href)="?(https?://[^"> ]+)', page.text)
    assert not links, links
    key, serve.KEY = serve.KEY, "secret"
    try:
        assert running.http.get("/").status_code == 401
    finally:
        serve.KEY = key


@pytest.mark.parametrize("name", serve.RUNGS)
def test_next_tokens_are_the_model_s_and_sum_to_one(name, running):
    model = running.models[name]
    n = len(model.tokenizer.vocab)
    rows = serve.next_tokens(model, "ROMEO:\nG", 1.0, 0, 1.0, n)
    assert sum(after for *_, after in rows) == pytest.approx(1, abs=1e-4)
    ids = model.encode("ROMEO:\nG")[-model.window :]
    with torch.no_grad():
        expected = model.model(torch.tensor([ids]))[0, -1].softmax(dim=-1)
    for i, text, before, after in rows:
        assert before == pytest.approx(expected[i].item(), abs=1e-5) == pytest.approx(after, abs=1e-5)
        assert text == model.tokenizer.decode([i])
    cold = serve.next_tokens(model, "ROMEO:\nG", 0, 0, 1.0, n)
    assert [after for *_, after in cold] == [1.0] + [0.0] * (n - 1)
    few = serve.next_tokens(model, "ROMEO:\nG", 0.7, 3, 1.0, n)
    assert sum(after > 0 for *_, after in few) == 3
    nucleus = serve.next_tokens(model, "ROMEO:\nG", 1.0, 0, 0.5, n)
    kept = [before for _, _, before, after in nucleus if after > 0]
    assert sum(kept) >= 0.5 > sum(kept[:-1])


@pytest.mark.parametrize("name", serve.RUNGS)
def test_attention_is_what_the_model_computes(name, running):
    model = running.models[name]
    _, ids, layers = serve.read(model, "ROMEO:\nGood")
    if name in ("v0_bigram", "v1_mlp"):
        assert layers == []
        return
    assert len(layers) == (1 if name == "v2_attention" else len(model.model.blocks))
    for weights in layers:
        assert weights.shape[1:] == (len(ids), len(ids))
        assert torch.allclose(weights.sum(dim=-1), torch.ones(weights.shape[:2]), atol=1e-5)
        assert weights.triu(1).abs().max() == 0
    if name == "v5_gpt2":  # the first layer, from its own formula
        idx, seen = torch.tensor([ids]), []
        sdpa = torch.nn.functional.scaled_dot_product_attention
        with patch.object(torch.nn.functional, "scaled_dot_product_attention") as fused:
            fused.side_effect = lambda q, k, v, **more: seen.append((q, k)) or sdpa(q, k, v, **more)
            model.model(idx)
        q, k = (x[0] for x in seen[0])
        scores = torch.einsum("htd,hsd->hts", q, k) / math.sqrt(q.shape[-1])
        for t in range(len(ids)):
            assert torch.allclose(layers[0][:, t, : t + 1], scores[:, t, : t + 1].softmax(-1), atol=1e-5)


# --------------------------------------------- bad requests ---------------------------------------------

GOOD = {"model": "v6_amp_ddp", "prompt": "ROMEO", "max_tokens": 2}
CHAT = {"model": "v8_lora", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 2}
WRONG = [None, True, -1, 0, 1.5, 10**30, "x", "", [], {}, [1], ["x", 3], {"a": 1}, [None], [[]], "\ud800"]


def bad_bodies():
    """Bodies of which each is wrong in one place."""
    nothing = ("n", "top_p", "echo", "best_of", "logprobs", "max_tokens", "max_completion_tokens")
    allowed = {name: (None,) for name in (*nothing, "top_logprobs")}  # of WRONG, what these may be
    allowed |= dict.fromkeys(("model", "messages", "unknown", "tools"), ())
    allowed |= {"prompt": ("x", ""), "stream": (True,), "temperature": (None, 0, 1.5), "seed": (None, 0, -1)}
    allowed |= {"stop": (None, "x", []), "user": (None, "x", ""), "suffix": (None, "")}
    allowed |= {"presence_penalty": (None, 0), "frequency_penalty": (None, 0)}
    allowed |= dict.fromkeys(("logit_bias", "stream_options", "response_format"), (None, {}))
    for name in allowed.keys() - {"model", "messages", "prompt"}:
        allowed[name] = (None, *allowed[name])  # null is as if it had not been said
    chat_only = ("messages", "max_completion_tokens", "top_logprobs", "response_format")
    for name, fine in allowed.items():
        for value in WRONG:
            if (
                not any(value is x or (value == x and type(value) is type(x)) for x in fine)
                and value != "\ud800"
            ):
                route, good = ("chat/completions", CHAT) if name in chat_only else ("completions", GOOD)
                yield route, good | {name: value}
    for message in ({}, {"role": "user"}, {"role": "king", "content": "a"}, {"role": "user", "content": 3}):
        yield "chat/completions", CHAT | {"messages": [message]}
    yield "chat/completions", CHAT | {"messages": [{"role": "assistant", "content": "a"}]}
    yield "chat/completions", CHAT | {"model": "v6_amp_ddp"}
    yield "chat/completions", CHAT | {"max_completion_tokens": 3}
    yield (
        "chat/completions",
        CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a"}]}]},
    )
    yield "chat/completions", CHAT | {"messages": [{"role": "user", "content": "a" * 30_000}]}
    yield "chat/completions", CHAT | {"messages": [{"role": "user", "content": "a " * 5_000}]}
    yield "completions", GOOD | {"prompt": "a" * 30_000}
    yield "completions", GOOD | {"prompt": "日本"}
    yield "completions", GOOD | {"max_tokens": 201}
    yield "completions", GOOD | {"stop": ["a"] * 5}
    yield "completions", GOOD | {"stop": [""]}
    yield "completions", GOOD | {"stream_options": {"include_usage": True}}
    for model in (
        "../v6_amp_ddp",
        "v6_amp_ddp/",
        "cut",
        "other",
        "/etc/passwd",
        "v6_amp_ddp\0",
        "os",
        "x" * 5000,
    ):
        yield "completions", GOOD | {"model": model}


def test_bad_requests_are_refused_in_openais_form_and_harm_nothing(running):
    cases, codes = list(bad_bodies()), set()
    assert len(cases) >= 200
    for route, body in cases:
        answer = running.http.post(f"/v1/{route}", json=body)
        assert 400 <= answer.status_code < 500, (body, answer.text)
        told = answer.json()["error"]
        assert told.keys() == {"message", "type", "param", "code"} and told["message"], body
        codes.add(answer.status_code)
    assert codes == {400, 404}
    assert running.http.post("/v1/completions", json=GOOD).status_code == 200
    assert running.http.post("/v1/chat/completions", json=CHAT).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"null",
            b"3",
            b'"x"',
            b"\xff\xfe",
            b"\x00",
            b'{"model": "v6_amp_ddp"',
            b"{}" * 3,
        ),
        *(b'{"model": "v6_amp_ddp", "prompt": "\\ud800"}', b"[" * 100_000, b'{"a": NaN}'),
    ],
)
@pytest.mark.parametrize("kind", ["application/json", "text/plain", "application/x-www-form-urlencoded", ""])
def test_bodies_that_are_no_request(content, kind, running):
    answer = running.http.post("/v1/completions", content=content, headers={"content-type": kind})
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/completions"), ("GET", "/v1/nothing"), ("POST", "/health"), ("PUT", "/v1/models")],
)
def test_other_routes_and_methods(method, path, running):
    answer = running.http.request(method, path)
    assert answer.status_code in (404, 405) and answer.json()["error"]["message"]


# ------------------------------------------- the command line -------------------------------------------


def test_models_that_cannot_be_served_are_left_out_with_a_note(runs, capsys):
    models = serve.find_models(serve.Config(runs=str(runs)))
    told = capsys.readouterr().err
    assert set(models) == set(serve.RUNGS)
    assert "cut is not served" in told and "other is not served: it was saved by antigravity" in told
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_can_be_served_in_fewer_bits(kind, tmp_path):
    torch.manual_seed(0)
    model = save_model(tmp_path / "model")
    served = serve.Served("model", tmp_path / "model", serve.Config(quantize=kind))
    assert any(name.endswith(".codes") for name in served.engine.model.state_dict())
    idx = torch.tensor([served.encode("Good morrow")])
    small = v7.quantize(copy.deepcopy(model).eval(), v7.Config(quantize=kind))
    with torch.no_grad():
        assert torch.equal(small(idx), served.engine.model(idx))
        assert not torch.equal(model.eval()(idx), served.engine.model(idx))


def test_a_metrics_file_that_is_damaged_does_no_harm(tmp_path):
    save_model(tmp_path / "model")
    for text in ("3", "null", '{"val_loss": null, "bits_per_char": 2}', "{"):
        (tmp_path / "model" / "metrics.json").write_text(text, encoding="utf-8")
        served = serve.Served("model", tmp_path / "model", serve.Config())
        assert "parameters" in serve.card(served)


def test_a_port_that_is_taken_is_said_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(run_here("serve", f"--port={port}", cwd=tmp_path), "cannot listen", str(port))


def test_where_there_is_no_model_three_are_trained_first(tmp_path, monkeypatch):
    calls = []

    def train(command):
        calls.append(command)
        if "v3_gpt" in str(command[1]):
            save_model(tmp_path / "empty" / "v8_lora")
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr("subprocess.run", train)
    monkeypatch.setattr(uvicorn, "run", lambda app, **settings: calls.append(settings))
    process = run_here("serve", "--runs=empty", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert [call[1].name for call in calls[:3]] == ["v0_bigram.py", "v1_mlp.py", "v3_gpt.py"]
    assert calls[3]["host"] == "127.0.0.1" and "serves 1 models" in process.stdout


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("port=0", "--port 0"),
        ("port=70000", "--port 70000"),
        ("max_seconds=nan", "--max_seconds nan"),
        ("quantize=int2", "no --quantize int2"),
        ("n_rows=-1", "--n_rows -1"),
        ("x=1", "--x"),
    ],
)
def test_bad_flags_are_refused(flag, words, tmp_path):
    refused(run_here("serve", f"--{flag}", cwd=tmp_path), words)


def test_serve_holds_no_model_code():
    text = (serve.Path(serve.__file__)).read_text(encoding="utf-8")
    assert not re.search(r"\bnn\.(Module|Linear|Embedding)|backward|optim", text)


def test_a_refusal_says_what_to_do(running):
    def told(body, kind="application/json"):
        answer = running.http.post("/v1/completions", content=body, headers={"Content-Type": kind})
        assert answer.status_code == 400
        return answer.json()["error"]["message"]

    assert "no JSON" in told('{"model": "v3_gpt"')
    body = {"model": "v3_gpt", "prompt": "ROMEO"}
    assert "Content-Type: application/json" in told(json.dumps(body), "application/x-www-form-urlencoded")
    for name, value in {"frequency_penalty": 1, "logprobs": 2}.items():
        assert told(json.dumps(body | {name: value})) == f"{name}: it is not supported"
