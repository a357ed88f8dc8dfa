"""What a draw makes of its caption: tags shuffled and left out, wildcards, replacements. No torch.

The steps and their order are those of kohya's caption processing, the modes of tag dropout OneTrainer's.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

from finetune.config.wording import WordingConfig
from finetune.errors import UserError

Draw = Callable[[str], int]
"""A number from 0 to below 2**63 for each purpose."""

MOST = 20_000
"""Different captions that are encoded ahead. Those of Stable Diffusion 1.x take 240 kB each on the disk."""

WILDCARD = re.compile(r"\\(?P<escaped>[{}|])|(?P<doubled>\{\{|\}\})|\{(?P<options>(?:\\[{}|]|[^{}\\]|\\(?![{}|]))+)\}")


def worded(text: str, config: WordingConfig, draw: Draw, step: int) -> str:
    """A caption as one draw reads it.

    Args:
        text: the picture's own, which was not dropped.
        config: what is done to it.
        draw: the randomness of this draw.
        step: the optimizer step that it belongs to, for the warm-up.
    """
    text = _framed(text, config)
    if config.wildcards:
        text = _chosen(text, draw)
    if config.cuts:
        text = _tagged(text, config, draw, step)
    return _replaced(text, config)


def plain(text: str, config: WordingConfig | None) -> str:
    """A caption as previews show it: the first of every choice, and all tags in their order."""
    if config is None:
        return text
    still = config.model_copy(update={"shuffle": False, "tag_dropout": 0.0, "tag_warmup_steps": 0})
    return worded(text, still, lambda purpose: 0, 0)


def everything(text: str, config: WordingConfig | None) -> str:
    """All words that some draw of a caption can hold, every choice included."""
    return text if config is None else _replaced(_framed(text, config), config)


def unmatched(texts: Iterable[str], config: WordingConfig | None) -> list[str]:
    """Entries of the lists of tag dropout that no flexible tag of ``texts`` is; none where wildcards may make one."""
    if config is None or config.wildcards or not (patterns := config.tag_dropout_except + config.tag_dropout_only):
        return []
    tags = {tag for text in texts for tag in _parts(_framed(text, config), config)[1]}
    return [pattern for pattern in patterns if not any(_listed(tag, [pattern]) for tag in tags)]


def distinct(texts: Iterable[str], ahead: bool) -> list[str]:
    """Each of ``texts`` once; no more than the first ``MOST`` unless they have to be known.

    Args:
        ahead: all of them are to be encoded before the run.

    Raises:
        UserError: they are too many for that.
    """
    found: dict[str, None] = {}
    for text in texts:
        if len(found) == MOST and text not in found:
            if not ahead:
                break
            raise UserError(
                f"data.wording makes more than {MOST} different captions in this run, too many to encode ahead; "
                "set data.cache.text: false, which keeps the text encoder in memory"
            )
        found[text] = None
    return list(found)


def _framed(text: str, config: WordingConfig) -> str:
    return _tidy(" ".join(part for part in (config.prefix, text, config.suffix) if part))


def _chosen(text: str, draw: Draw) -> str:
    """``text`` with one option of each wildcard."""
    number = itertools.count()

    def one(found: re.Match[str]) -> str:
        if found["escaped"]:
            return found["escaped"]
        if found["doubled"]:
            return found["doubled"][0]
        options = re.split(r"(?<!\\)\|", found["options"])
        option = options[draw(f"wildcard {next(number)}") % len(options)]
        return re.sub(r"\\([{}|])", r"\1", option)

    return WILDCARD.sub(one, text)


def _tagged(text: str, config: WordingConfig, draw: Draw, step: int) -> str:
    """``text`` with its fixed tags in their places, and the flexible ones as this draw has them."""
    first, flexible, last = _parts(text, config)
    tags = list(enumerate(flexible[: _in_use(len(flexible), step, config.tag_warmup_steps)]))
    if config.shuffle:
        tags.sort(key=lambda tag: draw(f"tag order {tag[0]}"))
    if config.tag_dropout:
        count = len(tags)
        tags = [(place, tag) for place, tag in tags if not _dropped(place, count, tag, config, draw)]
    return _joint(config).join([*first, *(tag for _, tag in tags), *last])


def _dropped(place: int, count: int, tag: str, config: WordingConfig, draw: Draw) -> bool:
    """Whether a draw leaves out flexible tag ``place`` of ``count``, as OneTrainer's modes and lists have it."""
    if _listed(tag, config.tag_dropout_except) or (
        config.tag_dropout_only and not _listed(tag, config.tag_dropout_only)
    ):
        return False
    share = config.tag_dropout * (place / count if config.tag_dropout_mode == "weighted" else 1)
    purpose = "tag dropout" if config.tag_dropout_mode == "full" else f"tag dropout {place}"
    return draw(purpose) < share * 2**63


def _listed(tag: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern with ``*`` and ``?`` is the whole ``tag``, whatever their case. Brackets are themselves."""
    return any(fnmatchcase(tag.lower(), pattern.lower().replace("[", "[[]")) for pattern in patterns)


def _parts(text: str, config: WordingConfig) -> tuple[list[str], list[str], list[str]]:
    """Fixed tags, flexible ones, fixed ones at the end."""
    mark = config.keep_tokens_separator
    if mark is None or mark not in text:
        tags = _tags(text, config)
        return tags[: config.keep_tokens], tags[config.keep_tokens :], []
    first, _, rest = text.partition(mark)
    flexible, _, last = rest.partition(mark)
    return _tags(first, config), _tags(flexible, config), _tags(last.replace(mark, config.separator), config)


def _tags(text: str, config: WordingConfig) -> list[str]:
    return [tag for part in text.split(config.separator) if (tag := part.strip())]


def _in_use(count: int, step: int, warmup: int) -> int:
    """How many of ``count`` flexible tags a step uses: the first one at step 0, all of them from ``warmup`` on."""
    return count if step >= warmup or not count else 1 + step * (count - 1) // warmup


def _joint(config: WordingConfig) -> str:
    return f"{config.separator.strip()} "


def _replaced(text: str, config: WordingConfig) -> str:
    if config.secondary_separator:
        text = _joint(config).join(part.strip() for part in text.split(config.secondary_separator))
    text = _tidy(text)
    for old, new in config.replacements.items():
        text = text.replace(old, new)
    return _tidy(text)


def _tidy(text: str) -> str:
    return " ".join(text.split())
