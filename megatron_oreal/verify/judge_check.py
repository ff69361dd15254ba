"""Whether the servers of a judge can be asked, before anything depends on them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import openai

from megatron_oreal.config.errors import UserError
from megatron_oreal.verify.judge import read_key

if TYPE_CHECKING:
    from megatron_oreal.config.schema import JudgeConfig

WAY_OUT = "start the servers (examples/judge), or set judge.hosts=[] to go by the rules alone"


def survey_judges(config: JudgeConfig) -> dict[str, str]:
    """Asks every server for its models at once; returns what is wrong with each, by its URL.

    Empty where nothing is. Not collective; takes `judge.health_check_s` at most.

    Raises:
        UserError: The environment variable that shall hold the key is not set.
    """
    if not config.hosts:
        return {}
    ask = partial(_problem, config=config, key=read_key(config.api_key_variable))
    with ThreadPoolExecutor(len(config.hosts)) as pool:
        return dict(zip(config.hosts, pool.map(ask, config.hosts), strict=True))


def check_judges(config: JudgeConfig) -> None:
    """Refuses to start where no server can be asked; one is enough, the others may come.

    Raises:
        UserError: Names each server and what is wrong with it.
    """
    found = survey_judges(config) if config.when != "never" else {}
    if found and all(found.values()):
        problems = ", ".join(f"{url} {problem}" for url, problem in found.items())
        raise UserError(f"judge.hosts: {problems}; {WAY_OUT}")


def _problem(url: str, config: JudgeConfig, key: str) -> str:
    try:
        with openai.OpenAI(
            base_url=url, api_key=key, max_retries=0, timeout=config.health_check_s
        ) as client:
            models = client.models.list().data  # not iterated, which would ask for more pages
            names = [model.id for model in models]
    except openai.APITimeoutError:
        return f"does not answer within judge.health_check_s={config.health_check_s:g}"
    except openai.APIConnectionError:
        return "cannot be reached"
    except openai.APIStatusError as error:
        return f"answers with status {error.status_code}"
    except (
        openai.OpenAIError,
        ValueError,
        AttributeError,
        TypeError,
    ):  # it builds any JSON into one
        return "does not speak OpenAI's protocol"
    if names and config.model not in names:
        return f"serves {', '.join(names[:3])}, not judge.model={config.model}"
    return ""
