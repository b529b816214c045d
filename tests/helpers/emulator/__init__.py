"""A device for tests that stands in for a GPU: torch's device ``emu``, with the host's memory and the CPU's operators.

It shows where tensors are, what the host waits for, what is copied and which collectives run. An operator that mixes
``emu`` and ``cpu`` tensors fails, as on a GPU. It does not show speed, races between streams, or a GPU's rounding.

The trainer's commands run on it as on a GPU. The first use compiles ``device.cpp``, about 12 s:

    python -m tests.helpers.emulator trainer --manifest MANIFEST --set output=RUN
    torchrun --standalone --nproc_per_node 2 -m tests.helpers.emulator trainer --manifest MANIFEST

A test's worker calls :func:`install` before it imports the trainer, and then counts::

    with count_events() as events:
        engine(row)
    assert events.waits() == Counter()

Each rank uses ``emu:LOCAL_RANK``, and an allocation on another rank's device fails. ``torch.emu`` has the memory
functions of ``torch.cuda``.
"""

from tests.helpers.emulator.build import unavailable
from tests.helpers.emulator.device import Event, Events, count_events, load_device
from tests.helpers.emulator.install import install

__all__ = ["Event", "Events", "count_events", "install", "load_device", "unavailable"]
