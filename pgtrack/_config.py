"""
Settings: by argument, else `PRODUCTGRAPH_<NAME>`, else the default.

The class `Config` is the one table of settings.  A wrong value is a `ConfigError`
that names the setting or the variable, the rule and the fix.  With
`PRODUCTGRAPH_ENABLED=false` every client is disabled, no other variable is read, and
wrong arguments are as good as absent.
"""

from __future__ import annotations

import json
import math
import os
import re
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import attrs

from pgtrack._destinations import parse
from pgtrack.exceptions import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from pgtrack.typing import BeforeSend

__all__ = ["Config", "ConfigOptions", "is_left_out"]

PREFIX = "PRODUCTGRAPH_"
_ENABLED = PREFIX + "ENABLED"


class _WrongError(Exception):
    """A value breaks a rule; a ConfigError is made of it where its setting is known."""

    def __init__(self, rule: str, fix: str, shown: str | None = None) -> None:
        super().__init__(rule)
        self.rule = rule
        self.fix = fix
        self.shown = shown


Parse = Callable[[Any], Any]


@attrs.frozen
class _Setting:
    """How a setting is read: from an argument, or from the text of a variable."""

    default: Any
    parse: Parse
    from_environment: bool = True
    is_secret: bool = False


def _setting(default: Any, parse: Parse, **options: Any) -> Any:
    return attrs.field(
        default=default,
        metadata={_Setting: _Setting(default, parse, **options)},
        repr=_masked if options.get("is_secret") else True,
    )


def _masked(value: object) -> str:
    return "None" if value is None else "'***'"


# --- the rules -------------------------------------------------------------------


def _optional(parse: Parse) -> Parse:
    def parse_optional(value: Any) -> Any:
        return None if value is None else parse(value)

    return parse_optional


def _text(value: Any) -> str:
    if isinstance(value, str) and value.isprintable() and 0 < len(value) <= 255:  # noqa: PLR2004
        return value
    msg = "a printable text of 1 to 255 characters"
    raise _WrongError(msg, "Use the id that your ProductGraph server knows.")


def _key(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[\x21-\x7e]{1,1024}", value):
        return value
    msg = "1 to 1,024 visible ASCII characters, without spaces"
    kind = type(value).__name__
    shown = f"a {kind} of length {len(value)}" if isinstance(value, str) else kind
    raise _WrongError(msg, "Copy the key again; leave out line ends.", shown)


def _integer(low: int, high: int) -> Parse:
    def parse(value: Any) -> int:
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if type(number) is int and low <= number <= high:
            return number
        raise _WrongError(
            f"a whole number from {low:,} to {high:,}", "Choose one in that range."
        )

    return parse


_SIZE = re.compile(r"\s*(\d{1,15})\s*(B|KB|MB|GB)?\s*", re.ASCII | re.IGNORECASE)
_SIZES = {"B": 1, "KB": 1_000, "MB": 1_000_000, "GB": 1_000_000_000}


def _bytes(low: int, high: int) -> Parse:
    def parse(value: Any) -> int:
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if match is not None:
            value = int(match[1]) * _SIZES[(match[2] or "B").upper()]
        if type(value) is int and low <= value <= high:
            return value
        rule = f"a number of bytes from {low:,} to {high:,}"
        raise _WrongError(rule, "Use a number, or a text such as '512KB' or '1MB'.")

    return parse


_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(ms|s|m|h|d)?\s*", re.ASCII)
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(*, zero: bool = False) -> Parse:
    def parse(value: Any) -> float:
        match = _DURATION.fullmatch(value) if isinstance(value, str) else None
        if match is not None:
            value = float(match[1]) * _UNITS[match[2] or "s"]
        number = math.nan if isinstance(value, str) else _number(value)
        if 0 < number < math.inf or (zero and number == 0):
            return number
        rule = f"a {'non-negative' if zero else 'positive'} number of seconds"
        raise _WrongError(rule, "Use a number, or a text such as '500ms', '5s', '1m'.")

    return parse


def _number(value: Any) -> float:
    """Return *value* as a number, NaN if it is none."""
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


_BOOLEANS = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _BOOLEANS:
        return _BOOLEANS[value.strip().lower()]
    raise _WrongError(
        "true or false", "Use 'true' or 'false' (also 1/0, yes/no, on/off)."
    )


def _choice(*choices: str) -> Parse:
    def parse(value: Any) -> str:
        if isinstance(value, str) and value in choices:
            return value
        raise _WrongError(" or ".join(map(repr, choices)), "Use one of them.")

    return parse


def _fraction(value: Any) -> float:
    number = _number(value)
    if 0.0 <= number <= 1.0:
        return number
    raise _WrongError(
        "a number from 0 to 1", "Use 0.1 to keep a tenth of all sessions."
    )


def _rate(value: Any) -> float:
    number = _number(value)
    if 1.0 <= number < math.inf:
        return number
    rule = "a number of events a second, 1 or more"
    raise _WrongError(rule, "Leave it out to have no limit.")


def _words(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [word.strip() for word in value.split(",") if word.strip()]
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        words = tuple(value)
        if all(isinstance(word, str) and word.strip() for word in words):
            return words
    raise _WrongError("a sequence of non-empty texts", "Use ('pin_code', 'iban').")


def _keys(value: Any) -> tuple[str, ...]:
    keys = _words(value)
    if all(any(map(str.isalpha, key)) for key in keys):
        return keys
    rule = "keys with at least one letter"
    raise _WrongError(rule, "Leave out those of digits and punctuation alone.")


def _hosts(value: Any) -> tuple[str, ...]:
    hosts = tuple(host.strip().lower() for host in _words(value))
    if None in map(parse, hosts):
        rule = "hosts: 'api.example.com', '*.example.com' or 'api.example.com:8080'"
        raise _WrongError(rule, "Leave out the scheme and the path.")
    return hosts


def _file(value: Any) -> str:
    path = Path(value) if isinstance(value, (str, os.PathLike)) else None
    if path is None or not path.is_file():
        raise _WrongError("the path of a file that exists", "Check the path.")
    return str(path)


def _folder(value: Any) -> str:
    text = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    try:
        is_path = isinstance(text, str) and text and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise _WrongError("the path of a folder", "Use '/var/lib/shop/pgtrack'.")
    path = Path(str(text)).absolute()  # the host may change its folder
    if path.exists() and not path.is_dir():
        raise _WrongError("a folder, or a path where one can be made", "Use another.")
    return str(path)


def _cert(value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) else value
    if isinstance(parts, (str, os.PathLike)):
        parts = [parts]
    if isinstance(parts, (list, tuple)) and len(parts) in (1, 2):
        return tuple(_file(part) for part in parts)
    rule = "the path of a PEM file, or the paths of a certificate and its key"
    raise _WrongError(rule, "Use ('client.pem', 'client.key').")


def _proxy(value: Any) -> str:
    url = _url(value)
    if url is not None and url.scheme in ("http", "https", "socks5") and url.hostname:
        return str(value)
    rule = "a URL such as 'http://proxy.example.com:3128'"
    raise _WrongError(rule, "Leave it out to use the environment's proxy.", "a text")


def _metadata(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return dict(value)
    kind = type(value).__name__
    rule = "a mapping with text keys (as a variable: a JSON object)"
    raise _WrongError(rule, "Use {'region': 'eu'}.", kind)


def _hook(value: Any) -> Any:
    if callable(value):
        return value
    rule = "callable with one event"
    raise _WrongError(rule, "Pass a function: before_send(event) -> event or None.")


def _url(value: Any) -> urllib.parse.SplitResult | None:
    try:
        url = urllib.parse.urlsplit(value)
        _ = url.port  # raises for what is no port
    except (TypeError, ValueError, AttributeError):
        return None
    return url if isinstance(value, str) and value.isprintable() else None


_ENDPOINTS = "an https:// URL, 'console:' or 'file:PATH'"
_STREAMS = ("console:", "console:stdout", "console:stderr")


def _endpoint(value: Any) -> str:
    if isinstance(value, str) and value in _STREAMS:
        return value
    if isinstance(value, str) and value.startswith("file:"):
        return _file_endpoint(value)
    url = _url(value)
    if url is None or url.scheme not in ("http", "https") or not url.hostname:
        fix = "Use the whole address, such as 'https://api.example.com/v1/events'."
        is_secret = not {"@", "?"}.isdisjoint(repr(value))
        raise _WrongError(_ENDPOINTS, fix, "one with '@' or '?'" if is_secret else None)
    if url.username is not None or url.password is not None:
        rule = "a URL without user and password"
        raise _WrongError(rule, "Put the key into `api_key`.", "one that has them")
    if url.fragment:
        raise _WrongError("a URL without a fragment", "Leave out '#' and what follows.")
    return str(value)


def _file_endpoint(value: str) -> str:
    path = Path(value.removeprefix("file:"))
    if str(path) == "." or path.is_dir() or not path.parent.is_dir():
        rule = "'file:PATH' with a PATH in a folder that exists"
        raise _WrongError(rule, "Create the folder, or use another path.")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _WrongError("a file that can be written", "Check its permissions.")
    return value


def is_loopback(host: str) -> bool:
    """Return whether *host* names this machine by itself, without asking a resolver."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    import ipaddress  # noqa: PLC0415  slow to load, and not needed for https

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- the settings ----------------------------------------------------------------


@attrs.frozen(init=False)
class Config:
    """
    The settings of one client, checked.

    Each may also be given as the environment variable `PRODUCTGRAPH_<NAME>` (except for
    `before_send`).  Durations are seconds, or texts such as `500ms`, `5s`, `1m`; sizes
    are bytes, or texts such as `512KB`, `1MB`.  docs/configuration.md explains each.

    Raises:
        ConfigError: If a value breaks its rule, or an enabled client lacks `project_id`
            or `endpoint`.
    """

    enabled: bool = _setting(None, _optional(_boolean))
    project_id: str | None = _setting(None, _optional(_text))
    endpoint: str | None = _setting(None, _optional(_endpoint))
    product_id: str | None = _setting(None, _optional(_text))
    api_key: str | None = _setting(None, _optional(_key), is_secret=True)
    batch_size: int = _setting(50, _integer(1, 1_000))
    batch_interval: float = _setting(5.0, _seconds())
    max_batch_bytes: int = _setting(1_000_000, _bytes(1_000, 9_500_000))
    max_event_bytes: int = _setting(100_000, _bytes(1_000, 9_000_000))
    max_queue_size: int = _setting(10_000, _integer(1, 100_000_000))
    max_queue_bytes: int = _setting(10_000_000, _bytes(10_000, 2**40))
    overflow: Literal["drop_newest", "drop_oldest"] = _setting(
        "drop_newest", _choice("drop_newest", "drop_oldest")
    )
    compression: Literal["auto", "gzip", "none"] = _setting(
        "auto", _choice("auto", "gzip", "none")
    )
    timeout: float = _setting(10.0, _seconds())
    retry_for: float = _setting(300.0, _seconds(zero=True))
    exit_timeout: float = _setting(3.0, _seconds(zero=True))
    spool_dir: str | None = _setting(None, _optional(_folder))
    max_spool_bytes: int = _setting(256_000_000, _bytes(100_000, 2**50))
    max_spool_age: float = _setting(7 * 86_400.0, _seconds())
    spool_each_event: bool = _setting(False, _boolean)  # noqa: FBT003
    spool_fsync: bool = _setting(False, _boolean)  # noqa: FBT003
    replay_rate: float | None = _setting(2_000.0, _optional(_rate))
    sample_rate: float = _setting(1.0, _fraction)
    session_rate_limit: float | None = _setting(None, _optional(_rate))
    redact_keys: tuple[str, ...] = _setting((), _keys)
    before_send: BeforeSend | None = _setting(  # noqa: RUF009  it makes a field
        None, _optional(_hook), from_environment=False
    )
    capture_stack: bool = _setting(False, _boolean)  # noqa: FBT003
    session_id_format: Literal["token", "uuid"] = _setting(
        "token", _choice("token", "uuid")
    )
    trust_user_header: bool = _setting(False, _boolean)  # noqa: FBT003
    default_session: bool = _setting(True, _boolean)  # noqa: FBT003
    propagate_to: tuple[str, ...] = _setting((), _hosts)
    allow_insecure: bool = _setting(False, _boolean)  # noqa: FBT003
    handle_sigterm: bool = _setting(True, _boolean)  # noqa: FBT003
    proxy: str | None = _setting(None, _optional(_proxy), is_secret=True)
    ca_bundle: str | None = _setting(None, _optional(_file))
    client_cert: tuple[str, ...] | None = _setting(None, _optional(_cert))
    metadata: Mapping[str, Any] | None = _setting(None, _optional(_metadata))
    service: str | None = _setting(None, _optional(_text))
    release: str | None = _setting(None, _optional(_text))
    environment: str | None = _setting(None, _optional(_text))
    debug: bool = _setting(False, _boolean)  # noqa: FBT003

    def __init__(self, **options: Unpack[ConfigOptions]) -> None:
        self._read(dict(options), os.environ)

    @classmethod
    def from_env(cls) -> Self:
        """
        Read every setting from the environment.

        `PRODUCTGRAPH_ENABLED=true` is needed to enable.

        Raises:
            ConfigError: If a variable is wrong; the message names it.
        """
        return cls()

    @classmethod
    def isolated(cls, **options: Unpack[ConfigOptions]) -> Self:
        """Return settings that the environment has no say in."""
        config = cls.__new__(cls)
        config._read(dict(options), {})  # noqa: SLF001  it is what __init__ calls
        return config

    @classmethod
    def disabled(cls) -> Self:
        """Return settings that disable, whatever the environment says."""
        return cls.isolated(enabled=False)

    def _read(self, options: dict[str, Any], environ: Mapping[str, str]) -> None:
        """Set every field: by *options*, else by *environ*, else its default."""
        settings = {f.name: f.metadata[_Setting] for f in attrs.fields(type(self))}
        if unknown := options.keys() - settings.keys():
            import difflib  # noqa: PLC0415  for what is misspelt alone

            wrong = min(unknown)
            msg = f"Config() got an unexpected keyword argument {wrong!r}"
            if close := difflib.get_close_matches(wrong, settings, 1):
                msg += f". Did you mean {close[0]!r}?"
            raise TypeError(msg)
        switch = _value_of("enabled", settings["enabled"], {}, environ)
        enabled = None
        if switch is not False:
            enabled = _value_of("enabled", settings["enabled"], options, {})
        if switch is False or enabled is False:
            environ = {}
        for name, setting in settings.items():
            try:
                value = _value_of(name, setting, options, environ)
            except ConfigError:
                if switch is not False:
                    raise
                value = setting.default
            self._set(name, value=value)
        if enabled is None and switch is not False:
            enabled = switch or options.get("endpoint") is not None
        self._set("enabled", value=bool(enabled))
        if enabled:
            self._check_together()

    def _set(self, name: str, *, value: object) -> None:
        object.__setattr__(self, name, value)  # the class is frozen

    def _check_together(self) -> None:
        for name, example in (
            ("project_id", "shop-backend"),
            ("endpoint", "https://api.example.com/v1/events"),
        ):
            if getattr(self, name) is None:
                variable = PREFIX + name.upper()
                msg = (
                    f"setting `{name}` must be given when pgtrack is enabled. Pass "
                    f"{name}={example!r} or set {variable}; or disable pgtrack with "
                    f"{_ENABLED}=false."
                )
                raise ConfigError(msg)
        if self.product_id is None:
            self._set("product_id", value=self.project_id)
        url = urllib.parse.urlsplit(str(self.endpoint))
        is_open = url.scheme == "http" and not is_loopback(url.hostname or "")
        if is_open and not self.allow_insecure:
            msg = (
                "setting `endpoint` must be an https:// URL unless its host is this "
                f"machine (got http://{url.hostname}). Use https, or "
                "allow_insecure=True to send events in the clear."
            )
            raise ConfigError(msg)
        if self.spool_dir is None and (self.spool_each_event or self.spool_fsync):
            name = "spool_each_event" if self.spool_each_event else "spool_fsync"
            msg = (
                f"setting `{name}` needs `spool_dir` (got none). Pass the folder in "
                "which events are to rest, such as '/var/lib/shop/pgtrack'."
            )
            raise ConfigError(msg)
        if self.spool_dir and self.max_spool_bytes < 8 * self.max_batch_bytes:
            msg = (
                "setting `max_spool_bytes` must be at least eight times "
                f"`max_batch_bytes` (got {self.max_spool_bytes:,} and "
                f"{self.max_batch_bytes:,}). Raise the one or lower the other."
            )
            raise ConfigError(msg)
        if self.max_event_bytes > self.max_batch_bytes:
            msg = (
                "setting `max_event_bytes` must not be more than `max_batch_bytes` "
                f"(got {self.max_event_bytes:,} and {self.max_batch_bytes:,}). "
                "Lower the one or raise the other."
            )
            raise ConfigError(msg)


def _value_of(
    name: str, setting: _Setting, options: Mapping[str, Any], environ: Mapping[str, str]
) -> Any:
    """Return the checked value of one setting."""
    variable = PREFIX + name.upper()
    if name in options:
        value, where = options[name], f"setting `{name}`"
    elif setting.from_environment and environ.get(variable):
        value, where = environ[variable], f"variable {variable}"
    else:
        return setting.default
    return _checked(setting.parse, value, where, is_secret=setting.is_secret)


def _checked(parse: Parse, value: Any, where: str, *, is_secret: bool = False) -> Any:
    try:
        return parse(value)
    except _WrongError as wrong:
        shown = wrong.shown
        if shown is None:
            shown = type(value).__name__ if is_secret else _shorten(value)
        msg = f"{where} must be {wrong.rule} (got {shown}). {wrong.fix}"
        raise ConfigError(msg) from None
    except (OSError, RecursionError) as error:
        msg = f"{where} cannot be used ({type(error).__name__}). Check its value."
        raise ConfigError(msg) from None


def is_left_out(options: ConfigOptions) -> bool:
    """Return whether the environment has an endpoint, and nobody said yes or no."""
    is_undecided = options.get("enabled") is None and not os.environ.get(_ENABLED)
    return is_undecided and bool(os.environ.get(PREFIX + "ENDPOINT"))


def _shorten(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001  the value's own code may raise anything
        return type(value).__name__
    if len(text) <= _MAX_SHOWN:
        return text
    return f"{type(value).__name__} of {len(text)} characters"


_MAX_SHOWN = 60


class ConfigOptions(TypedDict, total=False):
    """The keywords of `configure`: the fields of `Config`."""

    enabled: bool
    project_id: str | None
    endpoint: str | None
    product_id: str | None
    api_key: str | None
    batch_size: int
    batch_interval: float | str
    max_batch_bytes: int | str
    max_event_bytes: int | str
    max_queue_size: int
    max_queue_bytes: int | str
    overflow: Literal["drop_newest", "drop_oldest"]
    compression: Literal["auto", "gzip", "none"]
    timeout: float | str
    retry_for: float | str
    exit_timeout: float | str
    spool_dir: str | os.PathLike[str] | None
    max_spool_bytes: int | str
    max_spool_age: float | str
    spool_each_event: bool
    spool_fsync: bool
    replay_rate: float | None
    sample_rate: float
    session_rate_limit: float | None
    redact_keys: Iterable[str]
    before_send: BeforeSend | None
    capture_stack: bool
    session_id_format: Literal["token", "uuid"]
    trust_user_header: bool
    default_session: bool
    propagate_to: Iterable[str]
    allow_insecure: bool
    handle_sigterm: bool
    proxy: str | None
    ca_bundle: str | os.PathLike[str] | None
    client_cert: str | tuple[str, ...] | None
    metadata: Mapping[str, Any] | None
    service: str | None
    release: str | None
    environment: str | None
    debug: bool
