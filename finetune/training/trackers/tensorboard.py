"""Event files in the run directory, by TensorBoard's own writer.

They are only added to: what begins with `SessionLog.START` at a step tells readers to drop what they have of it and of later steps.
"""

import time as clock
from collections.abc import Mapping
from typing import TYPE_CHECKING

from finetune.recipe.load import to_yaml
from finetune.training.trackers.tracker import Start

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter


class Events:
    had = None

    def __init__(self, place: str, config: str, writer: "RecordWriter"):
        self.place = place
        self._config = config
        self._writer = writer

    def back_to(self, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        log = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=clock.time(), step=step + 1, session_log=log))
        if step < 0:
            self.note(0, "config", self._config, clock.time())

    def log(self, step: int, figures: Mapping[str, float], time: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._write(Event(wall_time=time, step=step, summary=Summary(value=values)))

    def note(self, step: int, kind: str, text: str, time: float) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        plugin = SummaryMetadata.PluginData(plugin_name="text")
        tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()])
        value = Summary.Value(tag=kind, metadata=SummaryMetadata(plugin_data=plugin), tensor=tensor)
        self._write(Event(wall_time=time, step=step, summary=Summary(value=[value])))

    def flush(self) -> None:
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()

    def _write(self, event: "Event") -> None:
        self._writer.write(event.SerializeToString())


def start(about: Start) -> Events:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder = about.run.tensorboard
    folder.mkdir(exist_ok=True)
    before = max((_number(path.name) for path in folder.glob("events.*")), default=0)
    # Readers take the files in the order of their names. TensorBoard's own have the second of their start, and two may share it.
    number = max(before + 1, int(clock.time()))
    writer = RecordWriter((folder / f"events.out.tfevents.{number:010d}.finetune").open("xb"))
    writer.write(Event(wall_time=clock.time(), file_version="brain.Event:2").SerializeToString())
    return Events(f"tensorboard --logdir {folder}", f"```yaml\n{to_yaml(about.config)}```", writer)


def _number(name: str) -> int:
    word = name.split(".")[3]
    return int(word) if word.isdecimal() else 0
