"""The launcher's switch: its options, and what waits for modules of others to be imported.

It runs when an interpreter starts, so it imports the standard library only; what happens to models
and trainers is in `launch`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_prefix_patch.launch import Launch

VARIABLE = "HF_PREFIX_PATCH"
CHOICES = {
    "backend": ("auto", "flash", "flex", "sdpa", "torch_varlen"),
    "on_bypass": ("warn", "ignore", "raise"),
    "on_refusal": ("raise", "warn"),
}
"""Values of options that take one of a few names; a wrong one is found before any model is."""

_ABSENT = object()


@dataclass(frozen=True)
class LaunchOptions:
    """How models and trainers are enabled; see `enable_prefix_sharing` for all but one.

    Attributes:
        on_refusal: what a trainer whose model cannot be shared does: `"raise"`, or `"warn"` and
            train without sharing.
    """

    backend: str = "auto"
    verify: bool = True
    on_bypass: str = "warn"
    on_refusal: str = "raise"
    log_metrics: bool = False
    max_tokens_per_batch: int | None = None
    sampler_options: dict[str, Any] | None = None
    keep_groups: bool = False

    @classmethod
    def of_environment(cls) -> LaunchOptions | None:
        """Those of the environment variable; None where it is not set, empty or `0`.

        Raises:
            ValueError: as `parse`.
        """
        text = os.environ.get(VARIABLE, "")
        return None if text in ("", "0") else cls.parse(text)

    @classmethod
    def parse(cls, text: str) -> LaunchOptions:
        """From the value of the environment variable: `1`, or a JSON object of options.

        Raises:
            ValueError: it is neither, or names an unknown option or a value that it does not take.
        """
        try:
            given = json.loads(text)
        except json.JSONDecodeError:
            given = None
        if given == 1 and not isinstance(given, bool):
            return cls()
        example = """1, or options as JSON such as '{"backend": "sdpa"}'"""
        if not isinstance(given, dict):
            raise ValueError(
                f"{VARIABLE}={text!r} is set, but must be {example}; unset it to do without"
            )
        kinds: dict[str, Any] = {field.name: type(field.default) for field in fields(cls)}
        kinds |= {"max_tokens_per_batch": int | None, "sampler_options": dict | None}
        for name, value in given.items():
            if name not in kinds:
                raise ValueError(
                    f"{VARIABLE} has an option {name!r}, but must have some of {list(kinds)}; "
                    "leave it out"
                )
            kind = kinds[name]
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                raise ValueError(
                    f"{VARIABLE} sets {name} to {value!r}, but must set it to a value of type "
                    f"{getattr(kind, '__name__', kind)}; write it as in {example}"
                )
            if name in CHOICES and value not in CHOICES[name]:
                raise ValueError(
                    f"{VARIABLE} sets {name} to {value!r}, but must set it to one of "
                    f"{CHOICES[name]}; leave it out for {CHOICES[name][0]!r}"
                )
            if kind == int | None and value is not None and value < 1:
                raise ValueError(
                    f"{VARIABLE} sets {name} to {value}, but must set it to at least 1; leave it "
                    "out to do without"
                )
        return cls(**given)

    def __str__(self) -> str:
        """What `parse` reads."""
        return json.dumps(asdict(self))


def switch_on(options: LaunchOptions) -> Switch:
    """Enable the models and trainers of this process as they come.

    A second call only sets the options, if no model has come yet.
    """
    switch = switch_that_is_on()
    if switch is None:
        switch = Switch(options)
        sys.meta_path.insert(0, switch)
        for name in list(switch.waiting):
            if name in sys.modules:
                switch.attach(name, sys.modules[name])
    switch.options, switch.fault = options, None
    return switch


def switch_that_is_on() -> Switch | None:
    """That of this process."""
    return next((finder for finder in sys.meta_path if isinstance(finder, Switch)), None)


def switch_on_from_environment() -> None:
    """As the environment variable says; run by `switch.pth` when Python starts.

    An error would only be printed there. A bad value ends the process when it imports transformers;
    other programs under the same variable are none of its concern.
    """
    try:
        options, fault = LaunchOptions.of_environment(), None
    except ValueError as error:
        options, fault = LaunchOptions(), str(error)
    if options is not None:
        switch_on(options).fault = fault


class Switch(MetaPathFinder):
    """Attaches to transformers' model loading and trainers, and to what shards models elsewhere,
    when their modules are imported."""

    def __init__(self, options: LaunchOptions) -> None:
        self.options = options
        self.fault: str | None = None
        self.waiting: dict[str, Callable[[Any], None]] = {
            "transformers.modeling_utils": self._attach_to_loading,
            "transformers.trainer": self._attach_to_construction,
            "deepspeed": self._attach_to_deepspeed,
            "verl.workers.engine.fsdp.transformer_impl": self._attach_to_verl,
        }
        self._launch: Launch | None = None
        self._replaced: list[tuple[Any, str, Any]] = []
        self._under_construction: set[int] = set()

    @property
    def used(self) -> bool:
        """Whether a model or a trainer has come."""
        return self._launch is not None

    def launch(self) -> Launch:
        """What enables; imported when the first model has come, long after its modules."""
        if self._launch is None:
            from hf_prefix_patch.launch import Launch

            self._launch = Launch(self.options)
        return self._launch

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, whose loader attaches when it has run."""
        if fullname not in self.waiting:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            self._attach_when_executed(fullname, spec.loader)
        return spec

    def _attach_when_executed(self, name: str, loader: Loader) -> None:
        def exec_module(module: ModuleType) -> None:
            del vars(loader)["exec_module"]
            loader.exec_module(module)
            if name in self.waiting:
                self.attach(name, module)

        vars(loader)["exec_module"] = exec_module

    def attach(self, name: str, module: ModuleType) -> None:
        """Attach to one of the modules that are waited for."""
        if self.fault is not None:
            raise SystemExit(f"hf_prefix_patch: {self.fault}")
        self.waiting.pop(name)(module)

    def _attach_to_loading(self, module: Any) -> None:
        original = module.PreTrainedModel.from_pretrained.__func__

        @functools.wraps(original)
        def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(cls, *args, **kwargs)
            self.launch().loaded(result[0] if isinstance(result, tuple) else result)
            return result

        self._replace(module.PreTrainedModel, "from_pretrained", classmethod(from_pretrained))

    def _attach_to_construction(self, module: Any) -> None:
        base = module.Trainer

        def __init_subclass__(cls: Any, /, **kwargs: Any) -> None:
            super(base, cls).__init_subclass__(**kwargs)
            self._watch_constructor(cls)

        self._replace(base, "__init_subclass__", classmethod(__init_subclass__))
        for cls in _with_subclasses(base):
            self._watch_constructor(cls)

    def _attach_to_deepspeed(self, module: Any) -> None:
        if hasattr(module, "DeepSpeedEngine"):  # no other module of that name
            self._act_after(
                module,
                "initialize",
                lambda args, result: self.launch().sharded(result[0], by_module=True),
            )

    def _attach_to_verl(self, module: Any) -> None:
        def act(args: Any, result: Any) -> None:
            engine = args[0]
            with engine.eval_mode():  # weights may be offloaded outside
                self.launch().sharded(engine.module, by_module=False)

        self._act_after(module.FSDPEngine, "initialize", act)

    def _act_after(self, owner: Any, name: str, act: Callable[[Any, Any], None]) -> None:
        """Call `act` with the arguments and the result of a function, if a model has come."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.used:
                act(args, result)
            return result

        self._replace(owner, name, watched)

    def _watch_constructor(self, cls: Any) -> None:
        """Act at the end of the outermost constructor: subclasses go on after that of the base."""
        if "__init__" not in vars(cls):
            return
        original = cls.__init__

        @functools.wraps(original)
        def __init__(trainer: Any, *args: Any, **kwargs: Any) -> None:
            outermost = id(trainer) not in self._under_construction
            self._under_construction.add(id(trainer))
            try:
                original(trainer, *args, **kwargs)
            finally:
                if outermost:
                    self._under_construction.discard(id(trainer))
            if outermost:
                self.launch().constructed(trainer)

        self._replace(cls, "__init__", __init__)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._replaced.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def off(self) -> None:
        """Detach; models and trainers that were enabled stay so. Twice is fine."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if self._launch is not None:
            self._launch.off()
        for owner, name, value in reversed(self._replaced):
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        self._replaced.clear()


def _with_subclasses(base: Any) -> list[Any]:
    below = [cls for child in base.__subclasses__() for cls in _with_subclasses(child)]
    return list(dict.fromkeys([base, *below]))
