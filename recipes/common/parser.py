"""TRL's command line as the recipes use it: a short `--help`, and a message for whatever is wrong."""

import argparse
from dataclasses import fields
from difflib import get_close_matches

from transformers.utils.logging import disable_progress_bar
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser
from yaml import YAMLError

disable_progress_bar()  # of loading weights; training and evaluation keep theirs

# What `--help` shows of TRL's arguments.
SHOWN = (
    "dataset_name",
    *("model_name_or_path", "output_dir", "learning_rate", "num_train_epochs", "max_steps", "seed", "report_to"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "gradient_checkpointing", "load_in_4bit"),
    *("save_strategy", "save_steps", "resume_from_checkpoint"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"),
)


class Help(argparse.Action):
    """`--help` leaves out most of TRL's arguments, and second spellings; `--help-all` nothing."""

    def __call__(self, parser, namespace, values, option_string=None):
        if option_string != "--help-all":
            trls = {field.name for group in (ScriptArguments, SFTConfig, ModelConfig) for field in fields(group)}
            for action in parser._actions:
                if action.dest in trls.difference(SHOWN) or action.option_strings[0].startswith("--no_"):
                    action.help = argparse.SUPPRESS
                elif action is not self:
                    del action.option_strings[1:]
        parser.print_help()
        parser.exit()


class RecipeParser(TrlParser):
    """TRL's parser, but whatever is wrong with a command line or a settings file is a message, not a traceback."""

    def __init__(self, recipe, groups):
        usage = "python -m %(prog)s [--config FILE.yaml] [--ARGUMENT VALUE ...]"
        super().__init__(groups, prog=recipe, usage=usage, add_help=False)
        text = "Show this; --help-all also shows every other argument of TRL's SFTConfig and ModelConfig."
        unset = {"nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}
        self.add_argument("-h", "--help", "--help-all", action=Help, help=text, **unset)

    def parse(self, defaults):
        """The command line, over its settings file, over `defaults`: one object per group."""
        self.set_defaults_with_config(**defaults)
        try:
            *arguments, rest = self.parse_args_and_config(return_remaining_strings=True)
        except (ValueError, OSError, YAMLError) as error:
            self.error(str(error))
        known = [option.lstrip("-") for action in self._actions for option in action.option_strings]
        for name in (word.lstrip("-").split("=")[0] for word in rest):
            close = get_close_matches(name, known, n=1)
            self.error(f"unknown argument {name!r}" + (f"; is it --{close[0]}?" if close else "; see --help-all"))
        self.check_choices(arguments)
        return arguments

    def set_defaults_with_config(self, **config):
        """A settings file may give one value where the command line takes several: `methods: queryable`."""
        several = {action.dest for action in self._actions if action.nargs == "+"}
        return super().set_defaults_with_config(
            **{
                name: [value] if name in several and isinstance(value, str) else value
                for name, value in config.items()
            }
        )

    def check_choices(self, arguments):
        """argparse checks the choices of a command line, but not those of a settings file."""
        values = {name: value for group in arguments for name, value in vars(group).items()}
        for action in self._actions:
            value = values.get(action.dest)
            for chosen in value if isinstance(value, list) else [value]:
                if action.choices and chosen is not None and chosen not in action.choices:
                    self.error(f"--{action.dest} must be one of {', '.join(map(str, action.choices))}, got {chosen!r}")
