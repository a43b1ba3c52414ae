"""Adapters added, loaded, saved, activated, disabled and deleted in any order: what must hold at every moment."""

import copy
import tempfile

import pytest
import torch
from helpers.models import mlp, outputs, randomise, router_of
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from peft_queryable import QueryableLoraConfig

CONFIGS = {
    "some": QueryableLoraConfig(r=4, num_atoms=6, top_k=3, router_dim=8, target_modules=["first", "third"]),
    "others": QueryableLoraConfig(
        r=2, num_atoms=3, top_k=2, num_blocks=1, router_dim=4, target_modules=["second", "third"]
    ),
    "one": QueryableLoraConfig(
        r=3, num_atoms=4, top_k=None, router_dim=4, target_modules=["third"], routing_scope="causal"
    ),
}
NAMES = ["one", "two", "three"]
INPUTS = {"x": torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))}


class AdapterLife(RuleBasedStateMachine):
    """One model, whose adapters come and go; `disabled` says whether they are switched off."""

    model: PeftModel

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        torch.manual_seed(0)
        self.base = mlp()
        self.saved: list[str] = []
        self.disabled = False

    def teardown(self) -> None:
        self.folder.cleanup()

    @property
    def adapters(self) -> list[str]:
        return list(self.model.peft_config)

    @property
    def free(self) -> list[str]:
        return [name for name in NAMES if name not in self.adapters]

    def trains(self, name: str) -> set[bool]:
        return {p.requires_grad for n, p in self.model.named_parameters() if f".{name}." in n}

    @initialize(kind=st.sampled_from(list(CONFIGS)), name=st.sampled_from(NAMES))
    def begin(self, kind, name):
        self.model = get_peft_model(copy.deepcopy(self.base), copy.deepcopy(CONFIGS[kind]), adapter_name=name).eval()
        randomise(self.model, name)

    @precondition(lambda self: self.free)
    @rule(kind=st.sampled_from(list(CONFIGS)), data=st.data())
    def add(self, kind, data):
        name = data.draw(st.sampled_from(self.free))
        self.model.add_adapter(name, copy.deepcopy(CONFIGS[kind]))
        randomise(self.model, name)

    @rule(data=st.data())
    def save(self, data):
        name = data.draw(st.sampled_from(self.adapters))
        place = f"{self.folder.name}/{len(self.saved)}"
        self.model.save_pretrained(place, selected_adapters=[name])
        self.saved.append(place if name == "default" else f"{place}/{name}")

    @precondition(lambda self: self.free and self.saved)
    @rule(data=st.data(), is_trainable=st.booleans())
    def load(self, data, is_trainable):
        place, name = data.draw(st.sampled_from(self.saved)), data.draw(st.sampled_from(self.free))
        self.model.load_adapter(place, name, is_trainable=is_trainable)

    @rule(data=st.data(), inference_mode=st.booleans())
    def activate(self, data, inference_mode):
        names = data.draw(st.lists(st.sampled_from(self.adapters), min_size=1, unique=True))
        self.model.base_model.set_adapter(names, inference_mode=inference_mode)
        for name in self.adapters:
            assert self.trains(name) == {name in names and not inference_mode}

    @precondition(lambda self: len(self.adapters) > 1)
    @rule(data=st.data())
    def delete(self, data):
        self.model.delete_adapter(data.draw(st.sampled_from(self.adapters)))

    @rule()
    def switch(self):
        self.disabled = not self.disabled
        change = (
            self.model.base_model.disable_adapter_layers
            if self.disabled
            else self.model.base_model.enable_adapter_layers
        )
        change()

    @rule()
    def disable_for_a_while(self):
        with self.model.disable_adapter():
            assert torch.equal(outputs(self.model, INPUTS), outputs(self.base, INPUTS))

    @invariant()
    def outputs_are_those_of_the_active_adapters_alone(self):
        if self.disabled:
            expected = outputs(self.base, INPUTS)
        else:
            expected = outputs(self.alone(self.model.active_adapters), INPUTS)
        assert torch.equal(outputs(self.model, INPUTS), expected)

    def alone(self, names: list[str]) -> PeftModel:
        """A new model with nothing but the adapters `names` of this one, all active."""
        configs = {name: copy.deepcopy(self.model.peft_config[name]) for name in names}
        result = get_peft_model(copy.deepcopy(self.base), configs[names[0]], adapter_name=names[0]).eval()
        for name in names:
            if name != names[0]:
                result.add_adapter(name, configs[name])
            set_peft_model_state_dict(result, get_peft_model_state_dict(self.model, adapter_name=name), name)
        result.base_model.set_adapter(names)
        return result

    @invariant()
    def an_adapter_trains_as_a_whole(self):
        assert all(len(self.trains(name)) == 1 for name in self.adapters)

    @invariant()
    def nothing_is_left_of_others(self):
        keys = [key.split(".") for key in self.model.state_dict()]
        assert {key[key.index("lora_A") + 1] for key in keys if "lora_A" in key} == set(self.adapters)
        assert set(self.model.base_model.queryable_lora_router) == set(self.adapters)
        stacks = self.model.base_model.stacks
        assert {name for stack in stacks for name in stack.plans} == set(self.adapters)
        for stack in stacks:
            for name, plan in stack.plans.items():
                assert plan.router is router_of(self.model, name)


# PEFT says which adapter becomes active when the active one is deleted.
TestAdapterLife = pytest.mark.filterwarnings("ignore:Adapter \\w+ was active which is now deleted:UserWarning")(
    AdapterLife.TestCase
)
TestAdapterLife.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
