"""lmms-eval's own model for OpenAI-compatible servers is a client of ours, with images and with videos."""

from __future__ import annotations

import pytest

from tests.helpers.model.torchvision_import import import_torchvision

import_torchvision()  # before anything imports transformers
pytest.importorskip("lmms_eval")
pytest.importorskip("dotenv")
from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.models.chat.openai import OpenAICompatible  # noqa: E402
from PIL import Image  # noqa: E402

from tests.helpers.corpora import training_corpus as corpus  # noqa: E402
from tests.helpers.servers.answering import MODEL, answering, data_url, video_part, write_run  # noqa: E402

pytestmark = pytest.mark.peers


def to_messages(doc: dict) -> list[dict]:
    return [{"role": "user", "content": [doc["media"], {"type": "text", "text": doc["question"]}]}]


def test_lmms_eval_asks_the_server(tmp_path):
    run = write_run(tmp_path)
    video, image = tmp_path / "v.mp4", tmp_path / "s.png"
    corpus.write_video(video, corpus.COLOURS["red"], 4)
    Image.new("RGB", (96, 96), "blue").save(image)
    picture = {"type": "image_url", "image_url": {"url": data_url(image, "image/png")}}
    docs = [
        {"media": {"type": "video", "url": data_url(video)}, "question": "Which colour?", "part": video_part(video)},
        {"media": {"type": "image", "url": Image.open(image)}, "question": "Which colour?", "part": picture},
        {"media": {"type": "image", "url": Image.open(image)}, "question": "What shape?", "part": picture},
    ]
    requests = [
        Instance(
            request_type="generate_until",
            arguments=("", to_messages, {"max_new_tokens": 8}, number, "asked", "test"),
            idx=number,
            metadata={"task": "asked", "doc_id": number, "repeats": 1},
        )
        for number in range(len(docs))
    ]
    with answering(run) as server:
        model = OpenAICompatible(
            model_version=MODEL,
            base_url=f"{server.url}/v1",
            api_key="none",
            num_concurrent=3,
            max_retries=1,
            pass_video_url=True,
        )
        model.task_dict = {"asked": {"test": docs}}
        found = [answer.text for answer in model.generate_until(requests)]
        assert found == [server.text([doc["part"], {"type": "text", "text": doc["question"]}]) for doc in docs]
    assert len(set(found)) > 1
