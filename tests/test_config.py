"""Settings: arguments, variables, defaults, and what is wrong with them."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import attrs
import pytest

import pgtrack
from pgtrack._config import Config, ConfigOptions, is_loopback
from pgtrack.exceptions import ConfigError

ENABLED = {"project_id": "p", "endpoint": "https://pg.example/v1/events"}
VARIABLES = {f"PRODUCTGRAPH_{name.upper()}": text for name, text in ENABLED.items()}
NAMES = [field.name for field in attrs.fields(Config)]
BOOLEANS = [
    ("capture_stack", False),
    ("trust_user_header", False),
    ("default_session", True),
    ("allow_insecure", False),
    ("handle_sigterm", True),
    ("debug", False),
]


def hook(event: Any) -> Any:
    """Stand for a hook."""
    return event


GOOD: list[tuple[str, Any, Any]] = [
    ("enabled", True, True),
    ("enabled", "yes", True),
    ("project_id", "proj_backend", "proj_backend"),
    ("project_id", "Küche 7", "Küche 7"),
    ("endpoint", "https://pg.example", "https://pg.example"),
    ("endpoint", "HTTPS://pg.example:8443/v1", "HTTPS://pg.example:8443/v1"),
    ("endpoint", "http://localhost:8080/v1", "http://localhost:8080/v1"),
    ("endpoint", "http://app.localhost/v1", "http://app.localhost/v1"),
    ("endpoint", "http://127.9.9.9/v1", "http://127.9.9.9/v1"),
    ("endpoint", "http://[::1]:8080/v1", "http://[::1]:8080/v1"),
    ("endpoint", "console:", "console:"),
    ("endpoint", "console:stderr", "console:stderr"),
    ("product_id", "prod_1", "prod_1"),
    ("api_key", "k-1_~!", "k-1_~!"),
    ("batch_size", 1, 1),
    ("batch_size", "1000", 1_000),
    ("batch_interval", 0.5, 0.5),
    ("batch_interval", 5, 5.0),
    ("batch_interval", "5", 5.0),
    ("batch_interval", "5s", 5.0),
    ("batch_interval", " 500 ms ", 0.5),
    ("batch_interval", "1m", 60.0),
    ("batch_interval", "1.5h", 5_400.0),
    ("max_batch_bytes", 9_500_000, 9_500_000),
    ("max_batch_bytes", "512KB", 512_000),
    ("max_batch_bytes", "1 mb", 1_000_000),
    ("max_event_bytes", "64KB", 64_000),
    ("max_event_bytes", "1000", 1_000),
    ("max_queue_size", 1, 1),
    ("max_queue_bytes", "1GB", 1_000_000_000),
    ("max_queue_bytes", "10000B", 10_000),
    ("overflow", "drop_oldest", "drop_oldest"),
    ("compression", "gzip", "gzip"),
    ("compression", "none", "none"),
    ("timeout", "30s", 30.0),
    ("retry_for", 0, 0.0),
    ("retry_for", "10m", 600.0),
    ("exit_timeout", "0", 0.0),
    ("spool_dir", "/var/lib/shop/pgtrack", "/var/lib/shop/pgtrack"),
    ("spool_dir", Path("/no/such/folder"), "/no/such/folder"),
    ("max_spool_bytes", 100_000, 100_000),
    ("max_spool_bytes", "2GB", 2_000_000_000),
    ("max_spool_age", "7d", 604_800.0),
    ("max_spool_age", "0.5 d", 43_200.0),
    ("max_spool_age", "90s", 90.0),
    ("spool_each_event", "no", False),
    ("spool_fsync", "no", False),
    ("replay_rate", None, None),
    ("replay_rate", 1, 1.0),
    ("replay_rate", "500", 500.0),
    ("sample_rate", 0, 0.0),
    ("sample_rate", "0.25", 0.25),
    ("session_rate_limit", 1, 1.0),
    ("session_rate_limit", "2.5", 2.5),
    ("redact_keys", ["pin_code", "iban"], ("pin_code", "iban")),
    ("redact_keys", "pin_code, iban,", ("pin_code", "iban")),
    ("redact_keys", "pin_code", ("pin_code",)),
    ("session_id_format", "uuid", "uuid"),
    (
        "propagate_to",
        "API.example, *.b.example:8080 ,[::1]:1",
        ("api.example", "*.b.example:8080", "[::1]:1"),
    ),
    ("propagate_to", ("localhost",), ("localhost",)),
    ("proxy", "http://proxy.example:3128", "http://proxy.example:3128"),
    ("proxy", "socks5://u:p@proxy.example", "socks5://u:p@proxy.example"),
    ("metadata", '{"region": "eu"}', {"region": "eu"}),
    ("service", "checkout", "checkout"),
    ("release", "1.2.3+4", "1.2.3+4"),
    ("environment", "prod", "prod"),
    *((name, not default, not default) for name, default in BOOLEANS),
    *((name, "on", True) for name, _ in BOOLEANS),
    *((name, " False ", False) for name, _ in BOOLEANS),
]
"""Setting, what is given, what it becomes."""

_SPOOL_BYTES = "a number of bytes from 100,000 to 1,125,899,906,842,624"

BAD: list[tuple[str, Any, str]] = [
    ("enabled", "maybe", "true or false"),
    ("project_id", "x" * 256, "a printable text of 1 to 255 characters"),
    ("project_id", "a\nb", "a printable text of 1 to 255 characters"),
    ("project_id", "a\ud800", "a printable text of 1 to 255 characters"),
    ("endpoint", "pg.example", "an https:// URL, 'console:' or 'file:PATH'"),
    ("endpoint", "ftp://pg.example", "an https:// URL, 'console:' or 'file:PATH'"),
    ("endpoint", "https://", "an https:// URL, 'console:' or 'file:PATH'"),
    ("endpoint", "https://a:99999", "an https:// URL, 'console:' or 'file:PATH'"),
    ("endpoint", "https://[::1", "an https:// URL, 'console:' or 'file:PATH'"),
    ("endpoint", "https://a/\n", "an https:// URL, 'console:' or 'file:PATH'"),
    ("endpoint", "console:file", "an https:// URL, 'console:' or 'file:PATH'"),
    ("endpoint", "https://u@a.example", "a URL without user and password"),
    ("endpoint", "https://a.example/#x", "a URL without a fragment"),
    ("endpoint", "file:", "'file:PATH' with a PATH in a folder that exists"),
    ("endpoint", "file:/", "'file:PATH' with a PATH in a folder that exists"),
    (
        "endpoint",
        "file:/no/such/folder/x",
        "'file:PATH' with a PATH in a folder that exists",
    ),
    ("product_id", "\t", "a printable text of 1 to 255 characters"),
    ("api_key", "with space", "1 to 1,024 visible ASCII characters, without spaces"),
    ("api_key", "key\n", "1 to 1,024 visible ASCII characters, without spaces"),
    ("api_key", "k" * 1025, "1 to 1,024 visible ASCII characters, without spaces"),
    ("batch_size", "0", "a whole number from 1 to 1,000"),
    ("batch_size", "1001", "a whole number from 1 to 1,000"),
    ("batch_size", "1.5", "a whole number from 1 to 1,000"),
    ("batch_size", "9" * 5_000, "a whole number from 1 to 1,000"),
    ("batch_interval", "0", "a positive number of seconds"),
    ("batch_interval", "-5s", "a positive number of seconds"),
    ("batch_interval", "5 days", "a positive number of seconds"),
    ("batch_interval", "9" * 400, "a positive number of seconds"),
    ("batch_interval", "nan", "a positive number of seconds"),
    ("max_batch_bytes", "999", "a number of bytes from 1,000 to 9,500,000"),
    ("max_batch_bytes", "10MB", "a number of bytes from 1,000 to 9,500,000"),
    ("max_event_bytes", "1kb?", "a number of bytes from 1,000 to 9,000,000"),
    ("max_event_bytes", "9" * 5_000, "a number of bytes from 1,000 to 9,000,000"),
    ("max_queue_size", "0", "a whole number from 1 to 100,000,000"),
    ("max_queue_bytes", "1KB", "a number of bytes from 10,000 to 1,099,511,627,776"),
    ("overflow", "drop", "'drop_newest' or 'drop_oldest'"),
    ("compression", "zstd", "'auto' or 'gzip' or 'none'"),
    ("timeout", "0", "a positive number of seconds"),
    ("retry_for", "-1", "a non-negative number of seconds"),
    ("exit_timeout", "soon", "a non-negative number of seconds"),
    ("spool_dir", "/dev/null", "a folder, or a path where one can be made"),
    ("max_spool_bytes", "99999", _SPOOL_BYTES),
    ("max_spool_bytes", "2000000GB", _SPOOL_BYTES),
    ("max_spool_age", "0d", "a positive number of seconds"),
    ("max_spool_age", "1 week", "a positive number of seconds"),
    ("spool_each_event", "each", "true or false"),
    ("spool_fsync", "2", "true or false"),
    ("replay_rate", "0.5", "a number of events a second, 1 or more"),
    ("replay_rate", "fast", "a number of events a second, 1 or more"),
    ("sample_rate", "1.1", "a number from 0 to 1"),
    ("sample_rate", "10%", "a number from 0 to 1"),
    ("sample_rate", "nan", "a number from 0 to 1"),
    ("session_rate_limit", "0.5", "a number of events a second, 1 or more"),
    ("session_rate_limit", "inf", "a number of events a second, 1 or more"),
    ("redact_keys", "123, _", "keys with at least one letter"),
    ("session_id_format", "UUID", "'token' or 'uuid'"),
    (
        "propagate_to",
        "https://a.example",
        "hosts: 'api.example.com', '*.example.com' or 'api.example.com:8080'",
    ),
    (
        "propagate_to",
        "a.example/path",
        "hosts: 'api.example.com', '*.example.com' or 'api.example.com:8080'",
    ),
    ("proxy", "proxy.example:3128", "a URL such as 'http://proxy.example.com:3128'"),
    ("ca_bundle", "/no/such.pem", "the path of a file that exists"),
    ("client_cert", "/no/such.pem", "the path of a file that exists"),
    (
        "client_cert",
        "a,b,c",
        "the path of a PEM file, or the paths of a certificate and its key",
    ),
    ("metadata", "[1]", "a mapping with text keys (as a variable: a JSON object)"),
    ("metadata", "{", "a mapping with text keys (as a variable: a JSON object)"),
    ("service", "\0", "a printable text of 1 to 255 characters"),
    ("release", "x" * 256, "a printable text of 1 to 255 characters"),
    ("environment", "\r", "a printable text of 1 to 255 characters"),
    *((name, "maybe", "true or false") for name, _ in BOOLEANS),
]
"""Setting, a text that is wrong as an argument and as a variable, the rule."""

BAD_ARGUMENTS: list[tuple[str, Any]] = [
    ("enabled", 1),
    ("project_id", ""),
    ("project_id", 5),
    ("endpoint", b"https://a.example"),
    ("endpoint", ""),
    ("api_key", ""),
    ("api_key", 5),
    ("batch_size", None),
    ("batch_size", True),
    ("batch_size", 5.0),
    ("batch_interval", None),
    ("batch_interval", True),
    ("batch_interval", float("inf")),
    ("batch_interval", float("nan")),
    ("batch_interval", 10**400),
    ("batch_interval", object()),
    ("max_event_bytes", 1e5),
    ("max_event_bytes", -(10**400)),
    ("overflow", None),
    ("overflow", ["drop_oldest"]),
    ("spool_dir", ""),
    ("spool_dir", b"/var/lib/shop"),
    ("spool_dir", "a\0b"),
    ("spool_dir", "a\ud800b"),
    ("spool_dir", 5),
    ("max_spool_bytes", None),
    ("max_spool_bytes", 1e6),
    ("max_spool_age", None),
    ("spool_each_event", None),
    ("spool_fsync", 1),
    ("replay_rate", True),
    ("sample_rate", True),
    ("sample_rate", 10**400),
    ("sample_rate", None),
    ("session_rate_limit", [1]),
    ("redact_keys", 5),
    ("redact_keys", {"pin": 1}),
    ("redact_keys", [1]),
    ("redact_keys", [""]),
    ("redact_keys", None),
    ("before_send", "module.hook"),
    ("before_send", 5),
    ("propagate_to", [b"a.example"]),
    ("proxy", 5),
    ("proxy", "http://"),
    ("ca_bundle", 5),
    ("ca_bundle", "\0"),
    ("client_cert", ()),
    ("client_cert", 5),
    ("metadata", {1: 2}),
    ("metadata", [("a", 1)]),
    *((name, None) for name, _ in BOOLEANS),
]
"""What is wrong as an argument alone."""


def set_variables(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], **settings: str
) -> None:
    """Set environment variables, and those of *settings*."""
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    for name, text in settings.items():
        monkeypatch.setenv(f"PRODUCTGRAPH_{name.upper()}", text)


class TestTable:
    """The class is the one table."""

    def test_the_keywords_of_configure_are_the_fields(self) -> None:
        """Each setting is an option of `configure`."""
        assert NAMES == list(ConfigOptions.__annotations__)

    def test_each_setting_has_a_good_and_a_bad_value_here(self) -> None:
        """No setting is left out of the tables of this file."""
        files = {"ca_bundle", "client_cert", "before_send"}

        assert set(NAMES) == {name for name, _, _ in GOOD} | files
        assert set(NAMES) == {name for name, _, _ in BAD} | {"before_send"}

    def test_the_defaults_are_the_documented_ones(self) -> None:
        """Without any argument or variable, each setting has its default."""
        config = Config(**ENABLED)
        shown = {name: getattr(config, name) for name in NAMES if getattr(config, name)}

        assert shown == {
            **ENABLED,
            "enabled": True,
            "product_id": "p",
            "batch_size": 50,
            "batch_interval": 5.0,
            "max_batch_bytes": 1_000_000,
            "max_event_bytes": 100_000,
            "max_queue_size": 10_000,
            "max_queue_bytes": 10_000_000,
            "overflow": "drop_newest",
            "compression": "auto",
            "timeout": 10.0,
            "retry_for": 300.0,
            "exit_timeout": 3.0,
            "max_spool_bytes": 256_000_000,
            "max_spool_age": 604_800.0,
            "replay_rate": 2_000.0,
            "sample_rate": 1.0,
            "session_id_format": "token",
            "default_session": True,
            "handle_sigterm": True,
        }

    def test_types_are_narrower_than_the_options(self) -> None:
        """Options may be texts with units; the fields are numbers."""
        options = typing.get_type_hints(
            ConfigOptions, localns={"BeforeSend": object, "os": __import__("os")}
        )

        assert options["batch_interval"] == float | str
        assert Config.__annotations__["batch_interval"] == "float"


class TestGoodValues:
    """What is taken."""

    @pytest.mark.parametrize(("name", "value", "expected"), GOOD)
    def test_by_argument(self, name: str, value: Any, expected: Any) -> None:
        """An argument becomes the setting."""
        config = Config(**{**ENABLED, name: value})

        assert expected == getattr(config, name)

    @pytest.mark.parametrize(
        ("name", "value", "expected"), [g for g in GOOD if isinstance(g[1], str)]
    )
    def test_by_variable(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: Any
    ) -> None:
        """A variable becomes the setting."""
        variables = {**VARIABLES, "PRODUCTGRAPH_ENABLED": "true"}
        set_variables(monkeypatch, variables, **{name: value})

        assert expected == getattr(Config.from_env(), name)

    def test_arguments_win_over_variables(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A variable, be it wrong, does not matter where there is an argument."""
        set_variables(monkeypatch, VARIABLES, batch_size="garbage", service="a")

        config = Config(**ENABLED, batch_size=7, service=None)

        assert (config.batch_size, config.service) == (7, None)

    def test_empty_variables_are_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A variable that is set to nothing is as good as not set."""
        set_variables(monkeypatch, {}, **dict.fromkeys(NAMES, ""))

        assert Config(**ENABLED) == Config.isolated(**ENABLED)

    def test_before_send_is_any_callable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The hook is an argument alone; its variable is not read."""
        set_variables(monkeypatch, {}, before_send="garbage")

        assert Config(**ENABLED, before_send=hook).before_send is hook
        assert Config(**ENABLED).before_send is None

    def test_files(self, tmp_path: Any) -> None:
        """Certificates are paths, of either kind, of files that exist."""
        pem = tmp_path / "a.pem"
        pem.touch()
        options = {**ENABLED, "endpoint": f"file:{tmp_path}/events.jsonl"}

        config = Config(**options, ca_bundle=pem, client_cert=pem)
        pair = Config(**options, client_cert=(str(pem), pem))
        text = Config(**options, client_cert=f"{pem},{pem}")

        assert config.ca_bundle == str(pem)
        assert config.client_cert == (str(pem),)
        assert pair.client_cert == text.client_cert == (str(pem), str(pem))

    @pytest.mark.parametrize("name", ["spool_each_event", "spool_fsync"])
    def test_what_needs_a_spool(self, monkeypatch, tmp_path, name: str) -> None:
        """With a folder to write to, each write may be asked for, in either way."""
        by_argument = Config(**ENABLED, spool_dir=tmp_path, **{name: True})
        set_variables(monkeypatch, {}, spool_dir=str(tmp_path), **{name: "yes"})
        by_variable = Config(**ENABLED)

        assert getattr(by_argument, name) is True
        assert by_argument == by_variable

    def test_the_spool_stays_where_it_is(self, monkeypatch, tmp_path) -> None:
        """A relative path is of the folder that the process is in now."""
        monkeypatch.chdir(tmp_path)
        config = Config(**ENABLED, spool_dir="var/spool")
        monkeypatch.chdir("/")

        assert str(tmp_path / "var" / "spool") == config.spool_dir

    def test_settings_alone_make_no_folder(self, tmp_path) -> None:
        """The folder is made by the client, not by its settings."""
        Config(**ENABLED, spool_dir=tmp_path / "spool")

        assert [] == list(tmp_path.iterdir())

    def test_the_metadata_is_a_copy(self) -> None:
        """What the caller changes afterwards changes no setting."""
        metadata = {"a": 1}
        config = Config(**ENABLED, metadata=metadata)
        metadata["b"] = 2

        assert config.metadata == {"a": 1}

    def test_http_elsewhere_needs_consent(self) -> None:
        """Events go out in the clear only where `allow_insecure` says so."""
        config = Config(
            project_id="p", endpoint="http://a.example", allow_insecure=True
        )

        assert config.endpoint == "http://a.example"


class TestBadValues:
    """What is refused, and how it is told."""

    @pytest.mark.parametrize(("name", "value", "rule"), BAD)
    def test_by_argument(self, name: str, value: str, rule: str) -> None:
        """The message names the setting, the rule and the fix."""
        with pytest.raises(ConfigError) as caught:
            Config(**{**ENABLED, name: value})
        message = str(caught.value)

        assert message.startswith(f"setting `{name}` must be {rule} (got ")
        assert message.endswith(".")
        assert "). " in message

    @pytest.mark.parametrize(
        ("name", "value", "rule"),
        [bad for bad in BAD if "\0" not in bad[1] and "\ud800" not in bad[1]],
    )
    def test_by_variable(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, rule: str
    ) -> None:
        """The message names the variable, the rule and the fix."""
        variables = {**VARIABLES, "PRODUCTGRAPH_ENABLED": "true"}
        set_variables(monkeypatch, variables, **{name: value})

        with pytest.raises(ConfigError) as caught:
            Config.from_env()

        start = f"variable PRODUCTGRAPH_{name.upper()} must be {rule} (got "
        assert str(caught.value).startswith(start)

    @pytest.mark.parametrize(("name", "value"), BAD_ARGUMENTS)
    def test_of_a_wrong_kind(self, name: str, value: Any) -> None:
        """A value of another kind is a ConfigError, too, which is a ValueError."""
        with pytest.raises(ConfigError, match=f"^setting `{name}` must be ") as caught:
            Config(**{**ENABLED, name: value})

        assert isinstance(caught.value, ValueError)

    def test_a_value_that_cannot_be_shown(self) -> None:
        """A value whose `repr` raises is named by its type."""

        class Odd:
            def __repr__(self) -> str:
                raise RuntimeError

        with pytest.raises(ConfigError, match=r"\(got Odd\)"):
            Config(**ENABLED, batch_size=Odd())  # type: ignore[arg-type]

    def test_long_values_are_not_shown(self) -> None:
        """A value of more than 60 characters is told by its length."""
        with pytest.raises(ConfigError, match=r"\(got str of 258 characters\)"):
            Config(**{**ENABLED, "project_id": "x" * 256})

    def test_a_misspelt_setting_is_a_type_error(self) -> None:
        """What is no setting is Python's own error."""
        with pytest.raises(TypeError) as caught:
            Config(batch_sise=5)  # type: ignore[call-arg]

        expected = "Config() got an unexpected keyword argument 'batch_sise'"
        assert f"{expected}. Did you mean 'batch_size'?" == str(caught.value)

    def test_a_setting_like_no_other_is_a_type_error(self) -> None:
        """Where nothing is near to what was given, nothing is suggested."""
        with pytest.raises(TypeError) as caught:
            Config(xyz=5)  # type: ignore[call-arg]

        assert str(caught.value).endswith("unexpected keyword argument 'xyz'")

    @pytest.mark.parametrize("missing", ENABLED)
    def test_what_must_be_given(self, missing: str) -> None:
        """An enabled client needs a project and an endpoint."""
        given = {name: text for name, text in ENABLED.items() if name != missing}

        with pytest.raises(ConfigError) as caught:
            Config(**given, enabled=True)

        assert f"setting `{missing}` must be given when" in str(caught.value)
        assert f"PRODUCTGRAPH_{missing.upper()}" in str(caught.value)
        assert "PRODUCTGRAPH_ENABLED=false" in str(caught.value)

    def test_http_to_another_machine(self) -> None:
        """Plain HTTP is refused, and the message has the host alone."""
        with pytest.raises(ConfigError, match=r"\(got http://a\.example\)") as caught:
            Config(project_id="p", endpoint="http://a.example/v1?key=s3cret")

        assert "allow_insecure=True" in str(caught.value)
        assert "s3cret" not in str(caught.value)

    def test_an_event_fits_a_batch(self) -> None:
        """No event may be larger than a batch."""
        with pytest.raises(ConfigError, match=r"\(got 5,000 and 4,000\)"):
            Config(**ENABLED, max_event_bytes=5_000, max_batch_bytes=4_000)

    @pytest.mark.parametrize("name", ["spool_each_event", "spool_fsync"])
    def test_what_needs_a_spool(self, name: str) -> None:
        """Writes of a kind that are asked for need a folder to write to."""
        with pytest.raises(ConfigError) as caught:
            Config(**ENABLED, **{name: True})

        start = f"setting `{name}` needs `spool_dir` (got none). "
        assert str(caught.value).startswith(start)

    def test_a_spool_holds_several_batches(self, tmp_path) -> None:
        """What has no room for a few batches is no spool."""
        options = {**ENABLED, "spool_dir": tmp_path, "max_batch_bytes": 500_000}
        with pytest.raises(ConfigError, match=r"\(got 3,999,999 and 500,000\)"):
            Config(**options, max_spool_bytes=3_999_999)

        assert Config(**options, max_spool_bytes=4_000_000).max_spool_bytes == 4_000_000

    def test_a_file_that_cannot_be_written(self, monkeypatch, tmp_path) -> None:
        """A file without the right to write is refused at once."""
        monkeypatch.setattr("os.access", lambda *_: False)

        with pytest.raises(ConfigError, match="must be a file that can be written"):
            Config(project_id="p", endpoint=f"file:{tmp_path}/events")


class TestSecrets:
    """What no message and no `repr` shows."""

    def test_the_repr_masks_them(self) -> None:
        """The key and the proxy are stars; no key and no proxy are None."""
        config = Config(**ENABLED, api_key="s3cret", proxy="http://u:s3cret@p.example")

        assert "s3cret" not in repr(config)
        assert "api_key='***'" in repr(config)
        assert "proxy='***'" in repr(config)
        assert "api_key=None" in repr(Config(**ENABLED))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("api_key", "s3cret with blanks"),
            ("api_key", b"s3cret"),
            ("proxy", "u:s3cret@proxy.example"),
            ("proxy", "ftp://u:s3cret@proxy.example"),
            ("endpoint", "https://u:s3cret@pg.example"),
            ("endpoint", "ftp://u:s3cret@pg.example"),
            ("endpoint", "https://u:s3cret@pg.example:99999"),
            ("endpoint", b"https://u:s3cret@pg.example"),
            ("metadata", ["s3cret"]),
            ("metadata", {1: "s3cret"}),
        ],
    )
    def test_messages_do_not_show_them(self, name: str, value: Any) -> None:
        """The message about a wrong secret does not have it."""
        with pytest.raises(ConfigError) as caught:
            Config(**{**ENABLED, name: value})

        assert f"`{name}`" in str(caught.value)
        assert "s3cret" not in str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


class TestSwitch:
    """What enables and what disables."""

    def test_an_endpoint_as_an_argument_enables(self) -> None:
        """Giving `endpoint` is enough."""
        assert Config(**ENABLED).enabled

    def test_variables_alone_do_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """By environment alone `PRODUCTGRAPH_ENABLED=true` is needed."""
        set_variables(monkeypatch, VARIABLES)
        without = Config.from_env()
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "true")

        assert not without.enabled
        assert Config.from_env().enabled

    @pytest.mark.parametrize("text", ["false", "0", "no", " OFF "])
    def test_false_wins_and_nothing_else_is_read(
        self, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        """`PRODUCTGRAPH_ENABLED=false` disables all, and forgives all."""
        set_variables(monkeypatch, {}, **dict.fromkeys(NAMES, "\x7f garbage"))
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", text)
        wrong = {name: value for name, value, _ in BAD} | {"enabled": True}

        assert not Config.from_env().enabled
        assert not Config(**ENABLED, enabled=True).enabled
        assert Config(**wrong) == Config.disabled()
        monkeypatch.setenv("PRODUCTGRAPH_BATCH_SIZE", "7")
        assert Config.from_env() == Config.disabled()

    def test_what_correlation_needs_is_kept(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Disabled by the environment, arguments still rule the correlation."""
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "false")

        config = Config(**ENABLED, session_id_format="uuid", propagate_to="a.example")

        assert config.session_id_format == "uuid"
        assert config.propagate_to == ("a.example",)

    def test_a_misspelt_setting_is_told_even_then(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Names are checked, whatever the environment says."""
        monkeypatch.setenv("PRODUCTGRAPH_ENABLED", "false")

        with pytest.raises(TypeError, match="batch_sise"):
            Config(batch_sise=5)  # type: ignore[call-arg]

    def test_disabled_by_argument_reads_no_variable(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`enabled=False` is as good, but wrong arguments are told."""
        set_variables(monkeypatch, {}, batch_size="garbage", enabled="true")

        assert not Config(enabled=False).enabled
        with pytest.raises(ConfigError, match="batch_interval"):
            Config(enabled=False, batch_interval=-1)

    def test_isolated_reads_no_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For tests there are settings that the environment has no say in."""
        set_variables(monkeypatch, {}, batch_size="garbage", enabled="false")

        assert Config.isolated(**ENABLED).enabled


class TestValue:
    """The value."""

    def test_it_is_frozen(self) -> None:
        """A setting cannot be changed."""
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            Config(**ENABLED).batch_size = 5  # type: ignore[misc]

    def test_equal_settings_are_equal(self) -> None:
        """Two configs of equal settings are equal, however they were written."""
        one = Config(**ENABLED, batch_interval="5s", redact_keys=["a"])
        two = Config(**ENABLED, redact_keys=("a",))

        assert one == two
        assert one != Config(**ENABLED)

    def test_it_can_be_evolved(self) -> None:
        """Another config is made of one by `attrs.evolve`."""
        config = attrs.evolve(Config(**ENABLED), batch_size=7)

        assert config == Config(**ENABLED, batch_size=7)

    def test_it_is_public(self) -> None:
        """The package exports it, and its error."""
        assert (pgtrack.Config, pgtrack.ConfigError) == (Config, ConfigError)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("a.localhost", True),
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("", False),
    ],
)
def test_loopback(host: str, expected: bool) -> None:
    """Only names and addresses of this machine are loopback; no resolver is asked."""
    assert expected == is_loopback(host)
