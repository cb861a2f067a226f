"""``generate``: answer prompts in the terminal."""

from __future__ import annotations

import argparse
from typing import Any

from handler.cli.common import add_model_arguments, choose_model, json_object, start_log
from handler.engines import load_model
from handler.generation import GenerationRequest, checked_text
from handler.parameters import parse_parameters
from handler.prompt_template import filled


def add_to(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer prompts in the terminal",
        description="Answer prompts in the terminal, one line each.",
    )
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--model", help="checkpoint folder or hub id (default: the demo)")
    parser.add_argument(
        "--parameters",
        default="{}",
        metavar="JSON",
        help='generation parameters, as {"max_new_tokens": 20}',
    )
    add_model_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print each prompt's answer. Raises LoadError, RequestError."""
    start_log(quiet=True)
    raw = json_object(arguments.parameters, "--parameters")
    prompts = [checked_text(prompt, "PROMPT") for prompt in arguments.prompts]
    choice = choose_model(arguments.model, arguments.option)
    model = load_model(choice.configuration)
    try:
        parameters = parse_parameters(raw, model.limits)
        requests = [
            GenerationRequest(text, parameters, log_probs=False)
            for text in filled(choice.configuration.prompt_template, prompts, {})
        ]
        for result in model.generate(requests):
            print(result.text)
    finally:
        model.close()
