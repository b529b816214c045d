"""The server over real connections: the ``openai`` package and plain HTTP, good and bad requests, many clients."""

from __future__ import annotations

import base64
import io
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest
from PIL import Image

from benchmarks import serve as bench
from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile
from framestream.pipeline.tokenization.chat_template import ChatTemplate
from framestream.trainer import serve
from framestream.trainer.inference.generation import Sampling
from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.documents import commands
from tests.helpers.paths import ROOT
from tests.helpers.servers.answering import (
    CHAT,
    MODEL,
    AnsweringServer,
    answering,
    data_url,
    question,
    video_part,
    write_run,
)

QUESTION = {"type": "text", "text": "Which colour is it?"}
LONG, LONGEST = 600, 1800  #: tokens of answers that take seconds


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A model that was never trained, with videos and images beside it."""
    folder = tmp_path_factory.mktemp("serve")
    for number, colour in enumerate(("red", "blue")):
        corpus.write_video(folder / f"v{number}.mp4", corpus.COLOURS[colour], 4 + 5 * number, seed=number)
        Image.new("RGB", (128 + 60 * number, 96), corpus.COLOURS[colour]).save(folder / f"s{number}.png")
    return write_run(folder)


@pytest.fixture(scope="module")
def server(run):
    with answering(run) as server:
        yield server


@pytest.fixture(scope="module")
def endless(run):
    """A small server whose answers end only at their limit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChatTemplate, "end_ids", property(lambda self: ()))
        with answering(run, max_batch=2, max_queue=2, max_tokens=LONGEST) as server:
            yield server


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(server: AnsweringServer, run: Path, text: str, *files: MediaFile, tokens: int = 8, **sampling) -> str:
    """The answer of the library to a question about files."""
    turns = [{"from": "human", "value": "<image>\n" * len(files) + text}]
    prompt = server.predictor.build_prompt(turns, files)
    return server.predictor.answer([prompt], tokens, Sampling(**sampling))[0]


# good requests --------------------------------------------------------------------------------------------------------


def test_the_openai_package_is_answered_as_the_library_answers(server, client, run):
    assert [model.id for model in client.models.list()] == [MODEL] and client.models.retrieve(MODEL).id == MODEL
    video, image = run.parent / "v0.mp4", run.parent / "s0.png"
    with open(video, "rb") as file:
        uploaded = client.files.create(file=file, purpose="user_data")
    assert uploaded.bytes == video.stat().st_size and uploaded.filename == "v0.mp4"
    assert uploaded.id in [file.id for file in client.files.list()]
    film, still = MediaFile(video), MediaFile(image, reader=IMAGE_READER)
    by_id = {"type": "file", "file": {"file_id": uploaded.id}}
    by_data = {"type": "file", "file": {"file_data": data_url(video), "filename": "a.mp4"}}
    picture = {"type": "image_url", "image_url": {"url": data_url(image, "image/png")}}
    part = MediaFile(video, 1.0, 3.0)
    cases = [([], []), ([by_id], [film]), ([by_data], [film]), ([video_part(video)], [film]), ([picture], [still])]
    cases += [([by_id, picture], [film, still]), ([by_id, by_id], [film, film]), ([picture, picture], [still, still])]
    cases += [([video_part(video, start=1, end=3)], [part])]
    answers = []
    for content, files in cases:
        messages = [{"role": "user", "content": [*content, QUESTION]}]
        done = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=8)
        answers.append(done.choices[0].message.content)
        assert answers[-1] == expected(server, run, QUESTION["text"], *files), content[:1]
        assert done.usage.prompt_tokens + done.usage.completion_tokens == done.usage.total_tokens
        assert done.usage.prompt_tokens > 64 * bool(files)
        chunks = list(
            client.chat.completions.create(
                model=MODEL, messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answers[-1]
        assert chunks[-1].usage == done.usage and not chunks[-1].choices
        assert chunks[-2].choices[0].finish_reason == done.choices[0].finish_reason
    assert len(set(answers)) > 4, "the media are really shown"
    assert client.files.retrieve(uploaded.id).id == uploaded.id and client.files.delete(uploaded.id).deleted
    with pytest.raises(openai.NotFoundError, match="no file"):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": [by_id, QUESTION]}])


def test_turns_sampling_and_stop_texts(server, run):
    sampling = {"temperature": 1.3, "top_p": 0.9, "seed": 5}
    sampled = server.text("Say a word.", max_tokens=12, **sampling)
    assert sampled == expected(server, run, "Say a word.", tokens=12, **sampling)
    assert len({server.text("Say a word.", temperature=2, max_tokens=12) for _ in range(3)}) > 1, "seeds differ"
    plain = server.text("Say a word.", max_tokens=12)
    stop = plain[3:6]
    cut = server.ask("Say a word.", max_tokens=12, stop=[stop, "never"]).json()["choices"][0]
    assert cut["message"]["content"] == plain[: plain.index(stop)] and cut["finish_reason"] == "stop"
    short = server.ask("Say a word.", max_completion_tokens=2).json()
    assert short["choices"][0]["finish_reason"] == "length" and short["usage"]["completion_tokens"] == 2
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    talk += [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    turns = [
        dict(zip(("from", "value"), (who, m["content"]), strict=True))
        for who, m in zip(("system", "human", "gpt", "human"), talk, strict=True)
    ]
    answer = server.predictor.answer([server.predictor.build_prompt(turns, [])], 8)[0]
    assert (
        server.client.post(CHAT, json={**question(""), "messages": talk}).json()["choices"][0]["message"]["content"]
        == answer
    )


def test_answers_are_equal_alone_and_in_a_batch(server, run):
    contents = [
        [video_part(run.parent / f"v{n % 2}.mp4"), {"type": "text", "text": f"Question {n}?"}] for n in range(6)
    ]
    contents += [f"What is {n} plus {n}?" for n in range(4)]
    settings = [{"max_tokens": 4 + 3 * n, "temperature": n % 2, "seed": n} for n in range(len(contents))]
    alone = [server.text(content, **more) for content, more in zip(contents, settings, strict=True)]
    with ThreadPoolExecutor(len(contents)) as pool:
        together = list(pool.map(lambda pair: server.text(pair[0], **pair[1]), zip(contents, settings, strict=True)))
    assert together == alone and len(set(alone)) > 5


def test_a_second_question_needs_neither_decoder_nor_tower(server, run, monkeypatch):
    video = video_part(run.parent / "v1.mp4", end=8.5)
    first = server.text([video, QUESTION])
    hits, misses = (server.metric(f"framestream_visual_cache_{name}_total") for name in ("hits", "misses"))
    monkeypatch.setattr(server.predictor.model.vision_tower, "forward", None)
    assert server.text([video, QUESTION]) == first
    assert server.metric("framestream_visual_cache_hits_total") == hits + 1
    assert server.metric("framestream_visual_cache_misses_total") == misses
    assert server.metric("framestream_visual_cache_bytes") > 0


def test_fewer_frames_are_shown_on_request(server, run):
    content = [video_part(run.parent / "v1.mp4"), QUESTION]
    used = [
        server.ask(content, media_io_kwargs={"video": {"num_frames": count}}).json()["usage"]["prompt_tokens"]
        for count in (4, 8)
    ]
    assert used[1] == used[0] + 64 and server.ask(content).json()["usage"]["prompt_tokens"] in (used[0], used[1])


def test_the_strip_shows_the_sampled_frames(server, run):
    with open(run.parent / "v0.mp4", "rb") as file:
        number = server.client.post("/v1/files", files={"file": ("v0.mp4", file)}).json()["id"]
    media = [MediaFile(run.parent / "v0.mp4")]
    (view,) = server.predictor.media_views(media)
    strip = server.client.get(f"/v1/files/{number}/frames").json()
    assert [frame["second"] for frame in strip["data"]] == pytest.approx(
        server.predictor.frame_times(media, view), abs=1e-3
    )
    image = Image.open(io.BytesIO(base64.b64decode(strip["data"][0]["image"].partition(",")[2])))
    assert strip["kind"] == "video" and image.format == "JPEG" and max(image.size) <= 160
    part = server.client.get(f"/v1/files/{number}/frames?start=2&end=3").json()["data"]
    assert part and all(2 <= frame["second"] < 3 for frame in part)
    for query in ("start=x", "end=-1", "start=2&end=1", "start=nan"):
        assert server.client.get(f"/v1/files/{number}/frames?{query}").status_code == 400
    assert server.client.get("/v1/files/none/frames").status_code == 404


def test_the_page_loads_nothing_from_elsewhere(server):
    page = server.client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    loaded = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert sorted(loaded) == ["data:,", "page.css", "page.js"]
    assert not re.search(r"<script>|<style|\son\w+=|\sstyle=", page.text), "the policy allows no code in the page"
    assert re.search(r"default-src 'none'.*script-src 'self'", page.headers["content-security-policy"])
    for name in ("page.css", "page.js"):
        text = server.client.get(f"/{name}").text
        assert len(text) > 1000 and not re.search(r"https?://|@import|innerHTML|eval\(", text)


# bad requests ---------------------------------------------------------------------------------------------------------


def refusal(response: httpx2.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and "\n" not in error["message"]
    return response.status_code, error["code"]


def bad_contents(folder: Path) -> list[tuple[object, int, str]]:
    text, small = b"<!doctype html>", io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(small, "PNG")
    bomb = f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"
    page = f"data:video/mp4;base64,{base64.b64encode(text).decode()}"
    cut = base64.b64encode((folder / "v0.mp4").read_bytes()[:3000]).decode()
    image = {"type": "image_url", "image_url": {"url": data_url(folder / "s0.png", "image/png")}}
    video = {"type": "video_url", "video_url": {}}
    return [
        ([{"type": "image_url", "image_url": {"url": bomb}}, QUESTION], 413, "too_many_pixels"),
        ([{**video, "video_url": {"url": page}}, QUESTION], 415, "not_media"),
        ([{**video, "video_url": {"url": f"data:video/mp4;base64,{cut}"}}, QUESTION], 422, "truncated"),
        ([{**video, "video_url": {"url": "data:video/mp4;base64,"}}, QUESTION], 400, "empty_file"),
        ([{**video, "video_url": {"url": "data:video/mp4,abc"}}, QUESTION], 400, "invalid_url"),
        ([{**video, "video_url": {"url": "file:///etc/passwd"}}, QUESTION], 400, "invalid_url"),
        ([{**video, "video_url": {"url": "http://127.0.0.1/a.mp4"}}, QUESTION], 400, "urls_not_allowed"),
        ([{"type": "file", "file": {"file_id": "../../etc/passwd"}}, QUESTION], 404, "file_not_found"),
        ([image] * 65 + [QUESTION], 400, "too_many_media"),
        ([image] * 1001, 400, "invalid_value"),
        ([video_part(folder / "v0.mp4")] * 9 + [QUESTION], 400, "too_many_media"),
        ([video_part(folder / "v0.mp4", start=50), QUESTION], 422, "bad_clip"),
        ("word " * 3000, 400, "context_length_exceeded"),
        ("word " * 100_000, 400, "context_length_exceeded"),
        (None, 400, "invalid_value"),
    ]


def test_bad_requests_are_one_clear_error_each(server, run):
    before = server.text(QUESTION["text"])
    for content, status, code in bad_contents(run.parent):
        response = server.ask(content)
        assert refusal(response) == (status, code), (str(content)[:200], response.text)
        assert str(run.parent) not in response.text and "/tmp" not in response.text
    for more, status, code in (
        ({"model": "gpt"}, 404, "model_not_found"),
        ({"max_tokens": 5000}, 400, "too_many_tokens"),
        ({"n": 2}, 400, "invalid_value"),
        ({"frames": 2}, 400, "unknown_field"),
    ):
        assert refusal(server.ask("?", **more)) == (status, code)
    post, get = server.client.post, server.client.get
    assert refusal(post(CHAT, content=b"{}", headers={"content-type": "text/plain"})) == (415, "wrong_content_type")
    assert refusal(post(CHAT, content=b"{", headers={"content-type": "application/json"})) == (400, "invalid_json")
    assert refusal(post("/v1/files", json={})) == (415, "wrong_content_type")
    assert refusal(post("/v1/files", data={"a": "b"}, files={"file": b"x"})) == (400, "unknown_field")
    assert refusal(post("/v1/files", data={"purpose": "b"}, files={"other": b"x"})) == (400, "unknown_field")
    assert refusal(post("/v1/files", files={"file": b""})) == (400, "empty_file")
    form = {"content-type": "multipart/form-data; boundary=x"}
    assert refusal(post("/v1/files", content=b"rubbish", headers=form))[0] == 400
    assert refusal(get("/v1/nothing")) == (404, "http_404") and refusal(post("/v1/models")) == (405, "http_405")
    assert refusal(server.client.delete("/v1/files/none")) == (404, "file_not_found")
    assert get("/health").json() == {"status": "ok"} and get("/ready").status_code == 200
    assert server.text(QUESTION["text"]) == before
    assert server.metric("framestream_store_bytes") < 1 << 20, "nothing of them stays on the disk"


def test_an_upload_that_is_no_media_is_refused(server):
    before = server.metric("framestream_store_bytes"), server.client.get("/v1/files").json()
    response = server.client.post("/v1/files", files={"file": ("a.mp4", b"import os\n" * 50)})
    assert refusal(response) == (415, "not_media") and response.json()["error"]["param"] == "file"
    assert (server.metric("framestream_store_bytes"), server.client.get("/v1/files").json()) == before


def test_a_stated_and_a_streamed_flood_are_refused_early(server):
    """10 GB: refused by its length at once, or at the limit as it arrives; the server reads no more."""
    host, port = server.url.removeprefix("http://").split(":")
    for path in (CHAT, "/v1/files"):
        with socket.create_connection((host, int(port)), timeout=20) as sock:
            sock.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {10 << 30}\r\n\r\n".encode())
            assert sock.recv(1000).startswith(b"HTTP/1.1 413 ")
    sent, chunk = 0, b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as sock:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        head += "Transfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head.encode())
        try:
            while sent < 10 << 30:
                sock.sendall(chunk)
                sent += 1 << 20
        except OSError:
            pass
    assert sent < 100 << 20
    assert server.text("Still there?") is not None


# clients that come and go ---------------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_slot(endless):
    for stream in (True, False):
        with httpx2.Client(base_url=endless.url, trust_env=False) as leaving:
            body = question("Tell a long story.", max_tokens=LONGEST, stream=stream)
            if stream:
                with leaving.stream("POST", CHAT, json=body) as response:
                    pieces = response.iter_bytes()
                    assert next(pieces)
                    endless.wait_until("framestream_running_requests", 1)
            else:
                with pytest.raises(httpx2.ReadTimeout):
                    leaving.post(CHAT, json=body, timeout=0.3)
        endless.wait_until("framestream_running_requests", 0)
    assert endless.ask("Hello?").json()["usage"]["completion_tokens"] == 8


def test_a_full_queue_is_refused_with_a_time(endless):
    body = question("Tell a long story.", max_tokens=LONG)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: endless.client.post(CHAT, json=body), range(12)))
    counts = Counter(answer.status_code for answer in answers)
    assert counts.keys() == {200, 429} and counts[200] >= 2
    for answer in answers:
        if answer.status_code == 429:
            assert refusal(answer) == (429, "queue_full") and 1 <= int(answer.headers["retry-after"]) <= 60
    assert len({a.json()["choices"][0]["message"]["content"] for a in answers if a.status_code == 200}) == 1


def test_load_is_answered_or_refused_and_memory_stays(endless, run):
    """24 clients for three seconds: text, videos, streams, and some that leave."""
    statuses: Counter[int] = Counter()
    ends = time.monotonic() + 3
    video = video_part(run.parent / "v0.mp4")

    def ask_often(number: int) -> None:
        with httpx2.Client(base_url=endless.url, trust_env=False, timeout=30) as client:
            turn = 0
            while time.monotonic() < ends:
                turn += 1
                content = [video, QUESTION] if (number + turn) % 3 == 0 else f"Question {turn}?"
                body = question(content, stream=bool(number % 2))
                with client.stream("POST", CHAT, json=body) as response:
                    statuses[response.status_code] += 1
                    if (number + turn) % 5:
                        data = response.read()
                        assert number % 2 == 0 or response.status_code != 200 or data.endswith(b"data: [DONE]\n\n")
                    else:
                        statuses[-1] += 1
                if response.status_code == 429:
                    time.sleep(0.02)

    endless.text([video, QUESTION])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with ThreadPoolExecutor(24) as pool:
        list(pool.map(ask_often, range(24)))
    left = statuses.pop(-1, 0)
    assert statuses.keys() == {200, 429} and statuses[200] >= 4 and left
    endless.wait_until("framestream_running_requests", 0)
    endless.wait_until("framestream_waiting_requests", 0)
    assert endless.metric("framestream_store_bytes") == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10, "kB"


def test_a_key_is_needed(run):
    with answering(run, api_key="k" * 20) as server:
        assert refusal(server.ask("Hello?")) == (401, "invalid_api_key")
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k" * 20, max_retries=0) as client:
            done = client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "a"}], max_tokens=2
            )
        assert done.usage.completion_tokens <= 2


def test_the_benchmark_counts_what_clients_see(server, run, capsys):
    videos = [run.parent / "v0.mp4", run.parent / "v1.mp4"]
    numbers = bench.upload(server.url, videos)
    for number in numbers:
        bench.ask_once(server.url, number)
    served = bench.measure_load(bench.Load(server.url, numbers, 3, 0.5, 4))
    alone = bench.ask_one_by_one(run, videos, True, 0.2, 4)
    for result in (served, alone):
        assert len(result.first_tokens) == result.statuses[200] > 0 and not result.broken
        assert min(result.first_tokens) > 0 and result.rate > 0
    assert bench.measure_load(bench.Load(server.url, ["file-0"], 1, 0.1, 4)).broken[0].startswith("404")
    bench.soak(bench.Load(server.url, numbers, 4, 1.0, 4), os.getpid())
    assert re.search(
        r"4 clients for \d s: \d+ answers .* 0 refused with 429, 0 errors; memory", capsys.readouterr().out
    )


# the command ----------------------------------------------------------------------------------------------------------


def fenced_python(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)


def test_the_command_serves_the_documented_client_and_drains(run, tmp_path, monkeypatch):
    """SIGTERM while an answer grows: it is completed, and the status is 0."""
    command = [sys.executable, "-m", "trainer.serve", str(run), "--port", "0", "--max-tokens", "2000"]
    process = subprocess.Popen(
        command, env=corpus.environment(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        found = re.fullmatch(r"serving toy on (http://127\.0\.0\.1:\d+)\n", line)
        assert found, line + process.stderr.read()
        (example,) = fenced_python((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))
        example = example.replace("http://127.0.0.1:8000", found[1]).replace('"stage4"', '"toy"')
        (tmp_path / "clip.mp4").write_bytes((run.parent / "v0.mp4").read_bytes())
        monkeypatch.chdir(tmp_path)
        exec(compile(example, "docs/serving.md", "exec"), {})
        body = question("Tell a story.", max_tokens=1500, stream=True, temperature=1.0, seed=3)
        with httpx2.stream("POST", f"{found[1]}{CHAT}", json=body, timeout=60, trust_env=False) as response:
            pieces = response.iter_bytes()
            data = next(pieces)
            process.send_signal(signal.SIGTERM)
            data += b"".join(pieces)
        assert data.endswith(b"data: [DONE]\n\n") and b'"error"' not in data
        assert process.wait(30) == 0, process.stderr.read()
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()


def test_the_documented_body_has_the_video(server, run, tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (script,) = [text for text in re.findall(r"^```sh\n(.*?)^```$", page, re.S | re.M) if "body.json" in text]
    (tmp_path / "clip.mp4").write_bytes((run.parent / "v0.mp4").read_bytes())
    script = script.replace("http://127.0.0.1:8000", server.url).replace('"stage4"', f'"{MODEL}"')
    written, _, sent = script.partition("curl ")
    subprocess.run(["sh", "-ec", written], cwd=tmp_path, check=True)
    assert sent.rstrip().endswith("-d @body.json")
    body = (tmp_path / "body.json").read_bytes()
    response = server.client.post(CHAT, content=body, headers={"content-type": "application/json"})
    same = server.ask([video_part(run.parent / "v0.mp4"), {"type": "text", "text": "What happens?"}])
    assert response.status_code == 200 and response.json()["usage"]["prompt_tokens"] > 64
    assert response.json()["usage"]["prompt_tokens"] == same.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("words", "status", "why"),
    [
        (["--port", "99999"], 2, "--port"),
        (["--max-batch", "0"], 2, "--max-batch"),
        (["--host", "0.0.0.0", "--port", "0"], 2, "without a key"),
        (["--host", "no.such.host.invalid", "--no-api-key"], 2, "cannot be used"),
        (["--model-name", "a b"], 2, "without spaces"),
        (["--max-quue", "3"], 2, "did you mean --max-queue?"),
        (["--checkpoint", "RUN"], 2, "name the checkpoint without an option: python -m trainer.serve CHECKPOINT"),
        (["--api-key-file", "KEY", "--port", "0"], 2, "at least 16"),
        (["--api-key-file", "MISSING", "--port", "0"], 1, "No such file"),
    ],
)
def test_options_that_do_not_fit_are_one_line(run, tmp_path, capsys, words, status, why):
    (tmp_path / "KEY").write_text("short\n")
    words = [str(tmp_path / word) if word in ("KEY", "MISSING") else word for word in words]
    try:
        found = serve.main([str(run), *words])
    except SystemExit as end:
        found = end.code
    said = capsys.readouterr().err
    assert found == status and said.startswith("error: ") and said.count("\n") == 1 and why in said, said


def test_a_port_in_use_and_missing_weights_are_one_line(run, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert serve.main([str(run), "--port", str(taken.getsockname()[1])]) == 2
        assert "cannot be used (Address already in use)" in capsys.readouterr().err
    assert serve.main([str(tmp_path / "none"), "--port", "0"]) == 1
    assert "no weights there" in capsys.readouterr().err


def test_the_page_of_commands_is_complete():
    """docs/serving.md names every option of the command."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    parser = serve._build_parser("serve")
    options = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
    assert not [name for name in options if name not in ("--help", "--set", "--manifest") and name not in page]
    assert any("trainer.serve" in command for _, command, _ in commands(page))
