"""What a config, a command or a message may hold and no file or screen must: passwords, keys and signed addresses.

`redact` cleans data that is written (a config), by the names of its keys; `redact_message` cleans text that is shown,
by patterns and by the secrets that are known: those of the environment and of the config of this process. A value of
the environment whose variable has no secret's name is none: it may well be a directory that messages must name.
"""

import logging
import os
import re
import shlex
import traceback
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import unquote

REDACTED = "REDACTED"
SECRET_WORDS = {
    *("apikey", "auth", "authorization", "cookie", "credential", "credentials", "key", "passphrase", "passwd"),
    *("password", "pwd", "secret", "secrets", "signature", "token"),
}
SECRET_NAMES = {"storage_options", "client_kwargs", "headers", "connection_string"}
# Members of samples and columns of tables.
PUBLIC_NAMES = {"caption_key", "second_caption_key", "image_key", "label_key", "group_key"}
MIN_KNOWN = 6  # characters: shorter values are words of everyday messages too

ENVIRONMENT = re.compile(r"\$\{oc\.env:\s*(\w+)\s*,[^{}]*\}")  # with a default, which is written out
REFERENCE = re.compile(r"\$\{(oc\.env:)?[\w.]+(,\s*null)?\}")  # to what is not written here
# A `?` without a `=` behind it is a pattern, not a query.
QUERY = re.compile(r"(://[^\s?#]*[?#])([^\s}]*=[^\s}]*)")
USER = re.compile(r"(?<=://)([^/\s]*)@")
NAMED = re.compile(r"\b([A-Za-z_]\w*)=([^\s,;'\"&]+)")
AUTHORIZATION = re.compile(r"(?i)\b(authorization['\"]?\s*[:=]\s*['\"]?)((?:basic|bearer)\s+)?[^\s'\"]+")

known: set[str] = set()  # the secrets of this process


def redact(value: Any, name: str = "") -> Any:
    """Return plain data without the values of secret names, in any depth, and with its texts redacted.

    Interpolations stay: `${oc.env:HF_TOKEN}` says where a secret comes from, not what it is.
    """
    if value is not None and is_secret(name):
        return value if isinstance(value, str) and REFERENCE.fullmatch(value) else REDACTED
    if isinstance(value, Mapping):
        return {key: redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner) for inner in value]
    return redact_text(value) if isinstance(value, str) else value


def is_secret(name: str) -> bool:
    """Tell whether a name is one of a secret: `secret_access_key` and `accessKeyId` are, `hf_tokenizer_name` is not."""
    if name in PUBLIC_NAMES:
        return False
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return name in SECRET_NAMES or any(word.lower() in SECRET_WORDS for word in words)


def redact_text(text: str) -> str:
    """Return a text without user, password and query of addresses, and without commands, which may hold anything."""
    text = re.sub(r"\bpipe:.*", f"pipe:{REDACTED}", redact_addresses(text), flags=re.DOTALL)
    return ENVIRONMENT.sub(lambda match: redact_default(match) if is_secret(match[1]) else match[0], text)


def redact_default(match: re.Match[str]) -> str:
    return f"${{oc.env:{match[1]},{REDACTED}}}"


def redact_addresses(text: str) -> str:
    """Return a text without the user, password and query of addresses."""
    return QUERY.sub(rf"\g<1>{REDACTED}", USER.sub(f"{REDACTED}@", text))


def redact_command(command: str) -> str:
    """Return a command line with the values of overrides of secret names redacted."""
    try:
        words = shlex.split(command)
    except ValueError:  # quotes that do not close: where a value ends is anyone's guess
        return redact_override(command)
    return shlex.join(map(redact_override, words))


def redact_override(word: str) -> str:
    """Return an override `a.b=value` redacted if any name in it, also inside braces, is a secret's."""
    key, equals, _ = word.partition("=")
    names = re.findall(r"\w+(?=\s*[=:](?!//))", word)
    if equals and any(map(is_secret, names)):
        return f"{key}={REDACTED}"
    return redact_text(word)


def redact_message(text: str) -> str:
    """Return a line of a log or of an error without addresses' credentials, `secret=value` and the known secrets.

    Unlike in data, a command of `pipe:` stays, so that what is said of it can be read.
    """
    for secret in sorted(known | set(environment_secrets()), key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    text = AUTHORIZATION.sub(rf"\g<1>{REDACTED}", redact_addresses(text))
    return NAMED.sub(lambda match: f"{match[1]}={REDACTED}" if is_secret(match[1]) else match[0], text)


def environment_secrets() -> Iterator[str]:
    """Yield the values of the environment's variables with secret names."""
    return (
        value
        for name, value in os.environ.items()
        if is_secret(name) and len(value) >= MIN_KNOWN and name != "PWD" and not os.path.exists(value)
    )


def remember(secrets: Iterable[str]) -> None:
    """Have `redact_message` know these secrets from now on."""
    known.update(secret for secret in secrets if len(secret) >= MIN_KNOWN and secret != REDACTED)


def find_secrets(value: Any, name: str = "") -> Iterator[str]:
    """Yield the secrets in plain data: values of secret names, in any depth, passwords and queries of addresses."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from find_secrets(inner, name if is_secret(name) and name not in SECRET_NAMES else str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from find_secrets(inner, name)
    elif isinstance(value, str):
        if is_secret(name) and not REFERENCE.fullmatch(value):
            yield from (value, value.rpartition(" ")[2])  # also of `Bearer ...`
        for match in USER.finditer(value):
            password = match[1].partition(":")[2] or match[1]
            yield from (password, unquote(password))
        for match in QUERY.finditer(value):
            values = (pair.partition("=")[2] for pair in match[2].split("&"))
            yield from (value for value in values if len(value) >= 2 * MIN_KNOWN)


def find_override_secrets(word: str) -> Iterator[str]:
    """Yield the secrets in an override, also inside braces, before Hydra has read it."""
    for name, value in re.findall(r"(\w+)\s*[=:]\s*([^\s,{}\[\]]+)", word):
        yield from find_secrets(value.strip("'\""), name)
    yield from find_secrets(word)


class RedactingFormatter(logging.Formatter):
    """Writes log lines, with their tracebacks, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redact_message(super().format(record))


def format_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> str:
    """Write a traceback as Python does, without secrets."""
    return redact_message("".join(traceback.format_exception(kind, error, trace)))
