"""One fine-tuning run through TRL, and what it measured."""

import copy
import shutil
import signal
import statistics
import time
from pathlib import Path

from transformers import TrainerCallback
from trl import SFTTrainer, get_quantization_config

from peft_queryable import QueryableLoraConfig, RoutingCallback

COUNTED_EVERY = 5  # steps: one for each entry of the recipes' logs
WARM_UP_STEPS = 3  # not timed: memory is still being allocated


def make_trainer(folder, config, train_dataset, training_args, model_args, eval_dataset=None) -> SFTTrainer:
    """An SFTTrainer whose adapter, made from `config`, goes to `folder`."""
    args = copy.deepcopy(training_args)
    args.output_dir = str(folder)
    args.run_name = folder.name if args.run_name is None else f"{args.run_name}-{folder.name}"
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(args.model_init_kwargs or {}),
    }
    return SFTTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=get_quantization_config(model_args),
        peft_config=config,
    )


def finetune(trainer: SFTTrainer, checkpoint: str | None = None) -> dict:
    """Train, from `checkpoint` if there is one, save the adapter, and return the run's numbers."""
    timer, interruption = StepTimer(), Interruption()
    trainer.add_callback(timer)
    trainer.add_callback(interruption)
    if isinstance(trainer.model.active_peft_config, QueryableLoraConfig):
        trainer.add_callback(RoutingCallback(every=COUNTED_EVERY))
    with interruption:
        trainer.train(resume_from_checkpoint=checkpoint)
    if interruption.is_asked:
        raise KeyboardInterrupt
    trainer.save_model()
    if "wandb" in trainer.args.report_to:  # the Trainer leaves its run open, and the next run would go on in it
        import wandb

        wandb.finish()
    if trainer.args.save_strategy == "no":  # nobody asked for the checkpoint of an interruption
        for folder in Path(trainer.args.output_dir).glob("checkpoint-*"):
            shutil.rmtree(folder)
    timed = timer.seconds[WARM_UP_STEPS:] or timer.seconds  # none where the checkpoint is of the last step
    return {
        "trainable_parameters": trainer.model.get_nb_trainable_parameters()[0],
        "seconds_per_step": statistics.median(timed) if timed else None,
        "losses": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "routes": [entry for entry in trainer.state.log_history if "routing/entropy" in entry],
    }


class StepTimer(TrainerCallback):
    """Seconds of each training step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


class Interruption(TrainerCallback):
    """The first Ctrl-C saves a checkpoint after the running step and ends training, a second one ends it at once."""

    def __init__(self):
        self.is_asked = False

    def __enter__(self):
        self.handler = signal.signal(signal.SIGINT, self.ask)

    def __exit__(self, *error):
        signal.signal(signal.SIGINT, self.handler)

    def ask(self, *args):
        signal.signal(signal.SIGINT, self.handler)
        self.is_asked = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.is_asked:
            control.should_save = control.should_training_stop = True
