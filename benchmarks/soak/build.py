"""Kill builds repeatedly and check the finished shards against a build without interruption.

    python -m benchmarks.soak.build [--kills 50] [--seed 0] [--workers 2] [--media 24]

The sources are a folder, a zip cut into parts, a tar.gz, files on a web server and an archive there. The server aborts
every 50th response. The corpus is built once without interruption. Then the build command receives SIGKILL at random
moments and is started again. A kill ends the command with its workers, or first one worker and the rest later. A
finished build is compared with the first one, and the next build begins, until all kills are done. The last build runs
to its end.

Exits with 1 if a finished root differs in a byte, a dialogue is in no shard and not in the ledger,
tools/verify_shards.py reports a finding, or files left behind by kills accumulate.

The moments of kills come from the seed, as numbers of new files, which measure progress on any machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.soak.errors import SoakError
from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.ledger import read_ledger
from framestream.pipeline.utils.atomic_io import file_sha256
from framestream.tools.verify_shards import main as verify
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.layouts import parts, read, serve, write
from tests.helpers.corpora.media_corpus import TEXT, TURNS
from tests.helpers.media.memory_files import pack
from tests.helpers.servers.web_server import Server

TOOLS = Path(__file__).parents[2] / "tools"
BREAKS = 50  #: the server aborts every BREAKS-th response
PROGRESS = 60  #: maximum number of new files before a kill
LOCATIONS = ("folder", "parts", "tar", "web", "archive")


class BuildCampaign:
    """The corpus in all its locations, and its builds below ``folder``."""

    def __init__(self, folder: Path, server: Server, media: int, workers: int) -> None:
        self._folder, self._server, self._workers = folder, server, workers
        self._answers = itertools.count(1)
        self.planned: Counter[tuple[str, str]] = Counter()  #: (entry, id) of every sample
        self.kills: Counter[str] = Counter()
        self.most_left = 0  #: largest number of temporary files and folders after a kill
        (folder / "notes").mkdir()
        files = {name: self._media(name, number, media) for number, name in enumerate(LOCATIONS)}
        packed = {"frames.zip": pack(files["archive"], "deflate")}
        write(folder / "parts", parts(pack(files["parts"], "stored"), "part_{}.zip"))
        write(folder / "tar", {"all.tar.gz": pack(files["tar"], "tar.gz")})
        write(folder / "folder", files["folder"])
        locations = {
            "folder": f"dir:{folder}/folder",
            "parts": {"archives": f"dir:{folder}/parts/part_*.zip", "join": True},
            "tar": {"archives": f"dir:{folder}/tar/*"},
            "web": f"url:{serve(server, 'web', files['web'])}/{{path}}",
            "archive": {"archives": f"url:{serve(server, 'packed', packed)}/frames.zip"},
            "hf:me/notes": f"url:{serve(server, 'notes', read(folder / 'notes'))}/{{path}}",
        }
        for path, route in list(server.routes.items()):
            server.routes[path] = self._unsteady(route)
        (folder / "roots.yaml").write_text(yaml.safe_dump(locations))

    def _media(self, name: str, number: int, count: int) -> dict[str, bytes]:
        """Write media of one location and their annotation file; return the media by path."""
        folder, samples = self._folder / "made" / name, [{"id": "text", "conversations": TEXT}, {"id": "bad"}]
        for item in range(count):
            seed = 1000 * number + item
            corpus.video(folder / f"{item}.mp4", seconds=1 + item % 3, seed=seed)
            samples.append({"id": f"v{item}", "video": f"{item}.mp4", "conversations": TURNS})
            if item % 3 == 0:
                corpus.still(folder / f"{item}.png", seed=seed)
                samples.append({"id": f"i{item}", "image": f"{item}.png", "conversations": TURNS})
                samples.append({"id": f"c{item}", "video": f"{item}.mp4", "start": 0.25, "conversations": TURNS})
        for frame in range(6):
            corpus.still(folder / "frames" / f"{frame}.jpg", seed=frame)
        (folder / "page.mp4").write_text("<html>")
        for bad in ("page.mp4", "missing.mp4"):
            samples.append({"id": bad, "video": bad, "conversations": TURNS})
        if name != "web":  # the web source cannot list folders
            samples.append({"id": "f", "video": "frames", "video_read_type": "img", "conversations": TURNS})
        corpus.annotations(self._folder / "notes" / f"{name}.jsonl", samples)
        self.planned += Counter((name, sample["id"]) for sample in samples)
        return read(folder)

    def _unsteady(self, route: Callable[[Any], None]) -> Callable[[Any], None]:
        def unsteady(request: Any) -> None:
            request.reset() if next(self._answers) % BREAKS == 0 else route(request)

        return unsteady

    def command(self, name: str) -> list[str]:
        """Return the command that builds to FOLDER/NAME/out/stage2."""
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        entries = [{"annotation": f"hf:me/notes:{name}.jsonl", "root": name, "name": name} for name in LOCATIONS]
        entries[2]["split"] = "val"
        data = {"entries": entries, "shard_mb": 1, "roots": str(self._folder / "roots.yaml")}
        manifest = corpus.manifest(folder / "m.yaml", [], data={**data, "cache": str(folder / "cache")})
        command = [sys.executable, str(TOOLS / "build_shards.py"), "--stage", "2", "--manifest", str(manifest)]
        return [*command, "--workers", str(self._workers), "--out", str(folder / "out")]

    def build_undisturbed(self) -> dict[str, bytes]:
        """Build without interruption and return the digests of the files."""
        self._finish("whole")
        return root_digests(self._folder / "whole" / "out")

    def run(self, seed: int, kills: int) -> int:
        """Build until ``kills`` processes have been killed; return the number of builds."""
        expected, rng, builds = self.build_undisturbed(), random.Random(seed), 0
        self._check("whole")
        while self.kills.total() < kills:
            name = f"build{builds}"
            builds += 1
            while self.kills.total() < kills and not self._build_with_kill(name, rng, kills):
                pass
            self._finish(name)
            if (found := root_digests(self._folder / name / "out")) != expected:
                differ = sorted(path for path in found.keys() | expected if found.get(path) != expected.get(path))
                raise SoakError(f"{name}: {len(differ)} files differ from the build without kills: {differ[:5]}")
            self._check(name)
        return builds

    def _build_with_kill(self, name: str, rng: random.Random, kills: int) -> bool:
        """Start a build and kill it; return whether it finished anyway."""
        process = subprocess.Popen(
            self.command(name),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
        one_first = rng.random() < 0.4 and self.kills.total() + 1 < kills
        try:
            for alone in (True, False) if one_first else (False,):
                self._wait(name, process, rng.randint(1, PROGRESS), rng.uniform(0, 0.05))
                if process.poll() is not None:
                    break
                if not alone:
                    os.killpg(process.pid, signal.SIGKILL)
                    self.kills["all"] += 1
                elif victims := build_workers(process.pid):
                    os.kill(rng.choice(victims), signal.SIGKILL)
                    self.kills["one worker"] += 1
            stderr = process.communicate()[1].decode(errors="replace")
        finally:
            process.kill()
        self._count_left(name)
        if process.returncode not in (0, -signal.SIGKILL):
            raise SoakError(f"{name}: exit code {process.returncode}: {stderr[-2000:]}")
        return process.returncode == 0

    def _wait(self, name: str, process: subprocess.Popen, files: int, seconds: float) -> None:
        root = self._folder / name / "out"
        target = sum(1 for _ in walk(root)) + files
        while process.poll() is None and sum(1 for _ in walk(root)) < target:
            time.sleep(0.005)
        time.sleep(seconds)

    def _finish(self, name: str) -> None:
        """Build to the end without kills."""
        result = subprocess.run(self.command(name), capture_output=True, text=True, env=environment())
        if result.returncode:
            raise SoakError(f"{name}: exit code {result.returncode}: {result.stderr[-2000:]}")

    def _count_left(self, name: str) -> None:
        """Check that leftovers of kills do not accumulate: the next start, or the next use, removes them."""
        folder = self._folder / name
        left = [
            path for path in walk(folder / "cache") if path.endswith(".tmp") or ".arrow." in path or ".gzip." in path
        ]
        left += [str(path) for path in (folder / "out").glob("stage2/work/tasks/*.tmp")]
        left += [str(path) for path in (folder / "out").glob("stage2/work/cache/scratch/*")]
        self.most_left = max(self.most_left, len(left))
        bound = 10 * self._workers + len(LOCATIONS)
        if len(left) > bound:
            raise SoakError(f"{name}: kills have left {len(left)} files and folders, more than {bound}: {left[:5]}")

    def _check(self, name: str) -> None:
        root = self._folder / name / "out" / "stage2"
        index, rows = Index.open(root), read_ledger(root).to_pylist()
        columns = index.dialogues.select(["entry", "id"]).to_pylist()
        found = Counter((row["entry"], row["id"]) for row in columns)
        found += Counter((row["entry"], row["dialogue"]) for row in rows if row["kind"] == "dialogue")
        if found != self.planned:
            raise SoakError(
                f"{name}: dialogues differ from the plan: {(found - self.planned) + (self.planned - found)}"
            )
        if verify([str(root), "--deep", "--workers", str(self._workers)]):
            raise SoakError(f"{name}: tools/verify_shards.py reports findings")
        if odd := [path for path in walk(self._folder / name / "cache") if path.endswith(".tmp")]:
            raise SoakError(f"{name}: left in the cache: {odd}")

    def figures(self) -> str:
        """Describe the build without kills."""
        root = self._folder / "whole" / "out" / "stage2"
        index, rows = Index.open(root), read_ledger(root).to_pylist()
        lost = sum(row["kind"] == "dialogue" for row in rows)
        record = json.loads((root / "build.json").read_bytes())
        shards = sum(record["shards"].values())
        return (
            f"{self.planned.total()} dialogues: {len(index.dialogues)} in shards, {lost} in the ledger; "
            f"{len(index.media)} media, {shards} shards"
        )


def environment() -> dict[str, str]:
    """Return the environment of a build, without proxies between it and the server."""
    return {name: text for name, text in os.environ.items() if not name.lower().endswith("_proxy")}


def walk(folder: Path) -> Iterator[str]:
    """Yield every file and folder below a folder that may change meanwhile."""
    for above, folders, files in os.walk(folder):
        yield from (os.path.join(above, name) for name in (*folders, *files))


def root_digests(folder: Path) -> dict[str, bytes]:
    """Return the digest of every file below a folder."""
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def build_workers(process: int) -> list[int]:
    """Return the process ids of a build's workers."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    named = {int(child): Path(f"/proc/{child}/cmdline") for child in children}
    return [child for child, line in named.items() if line.exists() and b"spawn_main" in line.read_bytes()]


def main() -> int:
    """Run a campaign and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--media", type=int, default=24, help="videos in each of the five locations")
    parser.add_argument("--folder", type=Path, help="folder for the files, 100 MB; default: a temporary one")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as name, Server() as server:
        campaign = BuildCampaign(Path(name), server, options.media, options.workers)
        try:
            builds = campaign.run(options.seed, options.kills)
        except SoakError as error:
            print(f"error: seed {options.seed}, {dict(campaign.kills)} kills: {error}", file=sys.stderr)
            return 1
        print(f"seed {options.seed}: {dict(campaign.kills)} killed in {builds} builds of {options.workers} workers")
        print(campaign.figures())
        print(f"same bytes, nothing lost; at most {campaign.most_left} temporary files left by a kill")
        print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
