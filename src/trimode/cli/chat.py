"""`trimode chat`: a conversation with history, whose mode and knobs can be changed between two answers."""

import importlib
import importlib.util
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.text import Text

from trimode.cli import screen
from trimode.cli.options import (
    KNOBS,
    Device,
    Dtype,
    Json,
    ModelName,
    Quantize,
    Stats,
    Threads,
    given,
    parse,
    takes_knobs,
)
from trimode.cli.tracing import TracePath, Tracer, tracing
from trimode.decoding.settings import MODES
from trimode.errors import ContextLengthError, PromptError, SettingError, TrimodeError, nearest
from trimode.viz import terminal

__all__ = ["chat"]

COMMANDS = {
    "/mode": ("/mode [MODE]", f"show or choose the mode: {', '.join(MODES)}"),
    "/set": ("/set [KNOB VALUE]", "show the knobs or set one; the value default takes it back"),
    "/stats": ("/stats [on|off]", "what the chat has cost; on, off: the line after each answer"),
    "/canvas": ("/canvas on|off", "show the block that is being filled"),
    "/system": ("/system [TEXT]", "set the system message, or drop it; starts a new conversation"),
    "/clear": ("/clear", "start a new conversation"),
    "/help": ("/help", "this list"),
    "/quit": ("/quit", "leave; so does Ctrl-D. Ctrl-C stops an answer"),
}


@takes_knobs
def chat(
    system: Annotated[
        str | None,
        typer.Option("--system", metavar="TEXT", rich_help_panel="Prompt", help="A system message for the start."),
    ] = None,
    model: ModelName = "smollm2-135m",
    dtype: Dtype = None,
    quantize: Quantize = None,
    device: Device = None,
    threads: Threads = None,
    json: Json = False,
    stats: Stats = None,
    canvas: Annotated[
        bool,
        typer.Option("--canvas", rich_help_panel="Output", help="Show the block that is being filled, as it fills."),
    ] = False,
    trace: TracePath = None,
    **knobs: Any,
) -> None:
    """Talk with a model.

    Reads one message a line, from the keyboard or from a pipe. /help inside the chat lists what can be changed while
    talking. Answers go to standard output, all else to standard error; with --json each answer is one JSON object on
    its own line.
    """
    settings = given(knobs)
    if json and canvas:
        raise SettingError("--canvas has no effect with --json. Leave one of them out.")
    if json and stats is not None:
        raise SettingError("--json always tells the statistics. Leave out --stats and --no-stats.")
    if canvas:
        screen.refuse_hidden_canvas()
    if sys.stdin is None or sys.stdin.closed:
        raise PromptError("Standard input is closed, so there is nobody to talk with.")
    with tracing(trace) as tracer:
        runner = screen.load(model, dtype=dtype, device=device, threads=threads, quantize=quantize)
        if runner.tokenizer is None:
            raise PromptError(f"{runner.name} has no tokenizer, so it cannot chat. Use trimode generate --prompt-ids.")
        conversation = Conversation(
            runner,
            settings,
            system=system,
            canvas=canvas,
            json=json,
            stats_after_each=stats is not False and not json,
            tracer=tracer,
        )
        if sys.stdin.isatty():
            screen.say(screen.title(runner))
            screen.say(Text("/help lists the commands, Ctrl-D leaves.", style="dim"))
        conversation.run()


@dataclass(slots=True)
class Conversation:
    """What one chat remembers: the messages, the knobs, and what the answers cost."""

    model: Any
    knobs: dict[str, Any]
    """Only those that the user set."""
    system: str | None = None
    canvas: bool = False
    json: bool = False
    stats_after_each: bool = True
    history: list[dict[str, str]] = field(default_factory=list)
    """The user's messages and the answers, without the system message."""
    costs: list[dict[str, Any]] = field(default_factory=list)
    """The statistics of every finished answer."""
    told: set[str] = field(default_factory=set)
    """Notices that were told; once is enough."""
    tracer: Tracer = field(default_factory=lambda: Tracer(None))

    def run(self) -> None:
        """Read and answer until the input ends, `/quit`, or Ctrl-C."""
        prompt = ""
        if sys.stdin.isatty() and sys.stdout.isatty():
            prompt = "> "
            _edit_lines()
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                if prompt:
                    print()
                return
            except UnicodeDecodeError:
                raise PromptError("Standard input is not UTF-8 text.") from None
            if line == "/quit":
                return
            try:
                if line.startswith("/"):
                    self.obey(line)
                elif line:
                    self.answer(line)
            except TrimodeError as error:
                screen.say(f"trimode: {screen.one_line(str(error))}{_way_out(error, asked=not line.startswith('/'))}")

    def answer(self, text: str) -> None:
        """Ask the model; the message joins the history only together with an answer to it."""
        message = {"role": "user", "content": text}
        start = [{"role": "system", "content": self.system}] if self.system else []
        asked = [*start, *self.history, message]
        knobs = {**self.knobs, **self.tracer.observing(self.model)}
        if self.json:
            output = self.model.generate(asked, **knobs)
            answer = output.text
            screen.print_json(screen.as_record(output))
        else:
            shown = screen.show(self.model.stream(asked, canvas=self.canvas, **knobs), canvas=self.canvas)
            output, answer = shown.output, shown.text
        if output is not None:
            self.costs.append(output.stats.as_dict())
        if output is not None or answer:
            self.history += [message, {"role": "assistant", "content": answer}]
        if output is None:
            screen.say(Text("stopped", style="dim"))
        elif self.stats_after_each:
            self.tell_notice(self.costs[-1].get("notice"))
            screen.say(terminal.stats_line(self.costs[-1], output.finish_reason))

    def obey(self, line: str) -> None:
        """Carry out one line that starts with a slash. Raises SettingError for one that makes no sense."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name not in COMMANDS:
            raise SettingError(f"Unknown command {name}.{nearest(name, COMMANDS)} /help lists them all.")
        {
            "/mode": self.choose_mode,
            "/set": self.set_knob,
            "/stats": self.tell_stats,
            "/canvas": self.switch_canvas,
            "/system": self.set_system,
            "/clear": self.clear,
            "/help": self.tell_help,
            "/quit": self.refuse_words_after_quit,
        }[name](rest)

    def choose_mode(self, mode: str) -> None:
        if mode:
            self.knobs["mode"] = parse("mode", mode)
        chosen = self.knobs.get("mode", "auto")
        screen.say(f"mode {chosen}")
        notice = self.model.notice(chosen)
        if mode:
            self.tell_notice(notice)

    def tell_notice(self, notice: str | None) -> None:
        if notice and notice not in self.told:
            self.told.add(notice)
            screen.say(Text(notice, style="dim italic"))

    def set_knob(self, words: str) -> None:
        name, _, value = words.partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if not name:
            told = ", ".join(f"{knob} {setting}" for knob, setting in self.knobs.items())
            screen.say(told or f"every knob has its default; there are {', '.join(KNOBS)}")
        elif value == "default":
            if name not in KNOBS:
                parse(name, value)  # raises, naming the nearest
            self.knobs.pop(name, None)
            screen.say(f"{name} default")
        elif not value:
            if name not in KNOBS:
                parse(name, value)
            screen.say(f"{name} {self.knobs.get(name, 'default')}: {KNOBS[name].help}")
        else:
            self.knobs[name] = parse(name, value)
            screen.say(f"{name} {self.knobs[name]}")

    def tell_stats(self, word: str) -> None:
        if word:
            self.stats_after_each = parse_switch("/stats", word)
            screen.say(f"statistics {word}")
        elif self.costs:
            screen.say(terminal.totals_line(self.costs))
        else:
            screen.say("no answers yet")

    def switch_canvas(self, word: str) -> None:
        switch = parse_switch("/canvas", word or "on")
        if switch:
            screen.refuse_hidden_canvas()
        self.canvas = switch
        screen.say(f"canvas {word or 'on'}")

    def set_system(self, text: str) -> None:
        self.system = text or None
        self.history.clear()
        screen.say("new conversation" + (", with this system message" if text else ", without a system message"))

    def clear(self, rest: str) -> None:
        _nothing_after("/clear", rest)
        self.history.clear()
        screen.say("new conversation")

    def tell_help(self, rest: str) -> None:
        _nothing_after("/help", rest)
        for usage, meaning in COMMANDS.values():
            screen.say(Text.assemble((f"{usage:<19}", "bold"), meaning))

    def refuse_words_after_quit(self, rest: str) -> None:
        _nothing_after("/quit", rest)


def parse_switch(name: str, word: str) -> bool:
    """True for on, False for off. Raises SettingError."""
    if word not in ("on", "off"):
        raise SettingError(f"{name} is on or off; got {word!r}.")
    return word == "on"


def _nothing_after(name: str, rest: str) -> None:
    if rest:
        raise SettingError(f"{name} stands alone; got {rest!r} after it.")


def _way_out(error: TrimodeError, *, asked: bool) -> str:
    """What can be done about it inside the chat, when the library's remedy is meant for another place."""
    if isinstance(error, ContextLengthError):
        return " /clear starts a new conversation."
    if isinstance(error, SettingError) and asked:
        return " (/set KNOB default takes a setting back.)"
    return ""


def _edit_lines() -> None:
    """Arrow keys and history at the prompt, where Python was built with them (importing the module is all it takes)."""
    if importlib.util.find_spec("readline") is not None:
        importlib.import_module("readline")
