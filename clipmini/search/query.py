"""What is asked for: a text, a picture, or a sum of them such as `2*cat - dog`."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clipmini.data.health import Fault
from clipmini.data.index import IMAGE_EXTENSIONS
from clipmini.data.tokenizer import count_tokens, trim
from clipmini.errors import UserError
from clipmini.evaluation.cache import hash_weights
from clipmini.evaluation.encoder import PRECISIONS, Encoder, evaluation_transform
from clipmini.model import encode_image, encode_text, padding
from clipmini.one_tower import check_has
from clipmini.search.layout import Row
from clipmini.sources import WEIGHTS, load_model

# A sign with a space before it, or at the beginning, and a space or a weight after it; not within double quotes.
SIGN = re.compile(r'(?:^|(?<=\s))([+-])(?:\s+|(?=[\d.]+\s*\*))(?=(?:[^"]*"[^"]*")*[^"]*$)')
MAX_TERMS = 16
WEIGHT = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*\*\s*")


@dataclass(frozen=True)
class Term:
    """A part of a query: how much of which text, or of the picture at which path."""

    weight: float
    text: str
    is_picture: bool = False


def is_picture(text: str) -> bool:
    """Say whether a text is the path of a picture: it has the name of one, or is a file."""
    return text.lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)) or is_file(text)


def is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # no path at all: too long, or with a zero in it
        return False


def parse_query(query: str, *, with_paths: bool = True) -> list[Term]:
    """Read a query.

    Args:
        with_paths: whether a part of it may be the path of a picture; else all are texts.

    Raises:
        UserError: a part of it is empty, there are too many, or all weights are 0.
    """
    if with_paths and is_file(query.strip()):
        return [Term(1.0, query.strip(), True)]
    first, *rest = SIGN.split(query)
    pairs = [("+", first)] if first.strip() or not rest else []
    pairs += list(zip(rest[::2], rest[1::2], strict=True))
    if len(pairs) > MAX_TERMS:
        raise UserError(f"query: has {len(pairs)} parts, more than {MAX_TERMS}")
    terms = [read_term(sign, text.strip(), query, with_paths) for sign, text in pairs]
    if not any(term.weight for term in terms):
        raise UserError(f"query={query!r}: all of its weights are 0")
    return terms


def read_term(sign: str, text: str, query: str, with_paths: bool) -> Term:
    """Read a part of a query without its sign."""
    found = WEIGHT.match(text)
    weight = float(found[1]) if found else 1.0
    text = text[found.end() :] if found else text
    is_literal = len(text) > 1 and text[0] == text[-1] == '"'
    text = text[1:-1] if is_literal else text
    if not text.strip() or not math.isfinite(weight):
        raise UserError(
            f"query={query!r}: a part of it is empty; it is a text, a picture, or a sum of them as in 2*cat - dog, "
            "with spaces around its signs"
        )
    return Term(-weight if sign == "-" else weight, text, with_paths and not is_literal and is_picture(text))


@dataclass(frozen=True)
class QueryEncoder:
    """Encodes queries with the model of an index."""

    encoder: Encoder

    def encode(self, query: str, *, with_paths: bool = True) -> Tensor:
        """Encode a query: the sum of the unit vectors of its parts, made a unit vector again, fp32 [D].

        Args:
            with_paths: whether a part of it may be the path of a picture.

        Raises:
            UserError: it cannot be read, or its parts cancel each other.
        """
        parts = [term.weight * self.encode_term(term) for term in parse_query(query, with_paths=with_paths)]
        total = torch.stack(parts).sum(dim=0)
        if total.norm() < 1e-4:
            raise UserError(f"query={query!r}: its parts cancel each other")
        return F.normalize(total, dim=0)

    def encode_term(self, term: Term) -> Tensor:
        return self.encode_picture(read_picture(term.text), term.text) if term.is_picture else self.encode_text(term)

    def encode_picture(self, data: bytes, name: str) -> Tensor:
        """Encode a picture: fp32 [D].

        Raises:
            UserError: it is none.
        """
        model = self.encoder.model
        check_has(model, "image", f"the picture {name}")
        try:
            image = self.encoder.transform(data)
        except Fault as fault:
            raise UserError(f"query={name}: {fault.cause}: {fault.detail}") from fault
        with self.encoder.ready():
            return encode_image(model, image[None].to(self.encoder.device)).float()[0].cpu()

    def encode_text(self, term: Term) -> Tensor:
        """Encode a text: fp32 [D].

        Raises:
            UserError: it is longer than what the model takes.
        """
        model, tokenize = self.encoder.model, self.encoder.tokenize
        check_has(model, "text", f"the text {term.text!r}")
        text = tokenize([term.text])
        (length,) = count_tokens(tokenize, [term.text])
        if length > text.shape[1]:
            raise UserError(f"query={term.text[:40]!r}...: has {length} tokens and the model takes {text.shape[1]}")
        with self.encoder.ready():
            return encode_text(model, trim(text, padding(model)).to(self.encoder.device)).float()[0].cpu()


def read_picture(path: str) -> bytes:
    """Read the file of a picture.

    Raises:
        UserError: it is not there.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"query={path}: {error.strerror}; a text that ends like a picture's name goes in quotes") from (
            error
        )


def load_query_encoder(record: Row, model: str | None, device: torch.device) -> QueryEncoder:
    """Load the model that an index was made with.

    Args:
        record: of the index.
        model: where it is now; None: where it was.

    Raises:
        UserError: it is another one.
    """
    given = record["model"] if model is None else model
    path = Path(given)
    is_run = path.suffix == ".ckpt" or (path / "checkpoints").is_dir()
    architecture = record["architecture"] if path.suffix in WEIGHTS else None
    source = load_model(given, architecture=architecture, weights=record["weights_of"] if is_run else "trained")
    found = hash_weights(source.model)
    if found != record["weights"]:
        raise UserError(
            f"model={given}: has the weights {found}, and the index was made with {record['weights']} "
            f"({record['name']}): its embeddings would not fit; give that model, or embed again"
        )
    precision = record["precision"] if record["precision"] in PRECISIONS else "fp32"
    transform = evaluation_transform(source.model)
    return QueryEncoder(Encoder(source.model.to(device), source.tokenizer(), transform, 1, 0, device, precision))
