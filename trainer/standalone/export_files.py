"""Write the code and the settings of an export that loads by itself.

The code is that of modules here and in training, copied as it is but for imports: those of this package name files
beside them in the folder. So the folder needs none of framestream, only :data:`REQUIREMENTS`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framestream.pipeline.config.preprocessing import FramesConfig, ImagesConfig, TextConfig
from framestream.pipeline.config.schema import to_dict

#: modules of the classes that ``auto_map`` names
ENTRY_MODULES = tuple(
    f"framestream.trainer.standalone.{kind}_framestream" for kind in ("configuration", "modeling", "processing")
)
#: modules that are copied, each as a file of its last name
MODULES = (
    *ENTRY_MODULES,
    *("framestream.trainer.standalone.media_inputs", "framestream.trainer.standalone.settings"),
    *(
        f"framestream.trainer.model.{name}"
        for name in ("attention", "dense_attention", "internvideo2", "tome", "umt", "vision_tower")
    ),
    *(f"framestream.pipeline.media.{name}" for name in ("errors", "file_kinds", "pixels", "resize", "sampling")),
    *(f"framestream.pipeline.media.{name}" for name in ("tiling", "video", "video_stream")),
)
#: modules in whose place ``settings.py`` stands
SETTINGS_MODULES = ("framestream.pipeline.config.model", "framestream.pipeline.config.preprocessing")
#: packages that the code imports, as pip takes them; PyAV reads video files
REQUIREMENTS = ("torch>=2.5", "transformers>=5", "numpy>=1.26.4", "pillow>=10.1", "av>=17.1")
AUTO_CLASSES = {
    "AutoConfig": "configuration_framestream.FramestreamConfig",
    "AutoModel": "modeling_framestream.FramestreamForCausalLM",
    "AutoModelForCausalLM": "modeling_framestream.FramestreamForCausalLM",
}
PROCESSOR_CLASS = "processing_framestream.FramestreamProcessor"
#: with which transformers finds the files that a file needs beside it
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\S+)\s+import", re.M)
_IMPORT = re.compile(r"^( *)from (framestream\.[\w.]+) import\b", re.M)
_HEADER = "# Part of a model exported by framestream. SPDX-License-Identifier: Apache-2.0\n"
#: of ``qwen_2``; ``SYSTEM`` is replaced by the default system turn as a literal
_CHAT_TEMPLATE = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\\n' + SYSTEM + '<|im_end|>\\n' }}{% endif %}"
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{{- part.text if part.type == 'text' else '<image>\\n' }}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_standalone_files(
    folder: Path, frames: FramesConfig, images: ImagesConfig, text: TextConfig, limit: int, compressed: bool
) -> dict[str, Any]:
    """Write code, processor settings and chat template to ``folder``.

    Args:
        frames, images, text: of the weights.
        limit: tokens that the model takes.
        compressed: the model was trained on frames and images that were stored as JPEGs.

    Returns:
        fields of config.json.
    """
    for module in MODULES:
        (folder / f"{module.rpartition('.')[2]}.py").write_text(standalone_source(module), encoding="utf-8")
    sections = {"frames": to_dict(frames), "images": to_dict(images)}
    if not compressed:
        sections = {name: {**section, "quality": None} for name, section in sections.items()}
    sections["text"] = {"template": text.template, "system": text.system, "limit": limit}
    processor = {"processor_class": PROCESSOR_CLASS.rpartition(".")[2], "auto_map": {"AutoProcessor": PROCESSOR_CLASS}}
    _write_json(folder / "processor_config.json", {**processor, **sections})
    if text.template == "qwen_2":
        template = _CHAT_TEMPLATE.replace("SYSTEM", json.dumps(text.system))
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    architecture = AUTO_CLASSES["AutoModel"].rpartition(".")[2]
    return {"architectures": [architecture], "auto_map": {**AUTO_CLASSES, "AutoProcessor": PROCESSOR_CLASS}}


def standalone_source(module: str) -> str:
    """Return the source of a module of :data:`MODULES` as it stands in an export."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    text = Path(spec.origin).read_text(encoding="utf-8")
    source = _HEADER + _IMPORT.sub(lambda match: f"{match[1]}from .{_file_name(match[2])} import", text)
    return source + _name_needed_files(source) if module in ENTRY_MODULES else source


def _name_needed_files(source: str) -> str:
    """Return lines that name all files that a source needs: transformers 5.0 copies no others of a local folder."""
    sources = {name.rpartition(".")[2]: name for name in MODULES}
    direct = set(RELATIVE_IMPORT.findall(source))
    needed, rest = set(direct), sorted(direct)
    while rest:
        found = set(RELATIVE_IMPORT.findall(standalone_source(sources[rest.pop()]))) - needed
        needed |= found
        rest += sorted(found)
    if needed == direct:
        return ""
    lines = [f"    from .{name} import __name__ as _{name}" for name in sorted(needed - direct)]
    head = ["", "from typing import TYPE_CHECKING", "", "if TYPE_CHECKING:  # never run; names the other files needed"]
    return "\n".join([*head, *lines, ""])


def _file_name(module: str) -> str:
    if module in SETTINGS_MODULES:
        return "settings"
    if module not in MODULES:
        raise ValueError(f"{module}: is not copied into exports; add it to MODULES or do not import it there")
    return module.rpartition(".")[2]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
