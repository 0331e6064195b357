"""Settings of the Python functions: those of the command line for the same data."""

from support.runs import silent

from fbpc_ray.core.presets import preset
from fbpc_ray.core.sizes import SizeRequest
from fbpc_ray.execution.keyword_settings import of_distillation
from fbpc_ray.execution.sizing import facts_of


def test_images_per_class_choose_the_row_of_table_4(digits):
    cifar10 = digits._replace(name="cifar10")
    for ipc in (1, 10, 50):
        config = of_distillation(cifar10, {"ipc": ipc, "gamma": 0.7}, None, "", "", "serial", silent)
        assert config == preset(f"cifar10-ipc{ipc}").updated(gamma=0.7, backend="serial")


def test_the_facts_that_sizes_depend_on_are_those_of_the_data(small, digits):
    facts = facts_of(small.updated(ipc=3), digits, SizeRequest(flags=frozenset({"width", "no_setting"})))
    assert facts[:6] == (1437, 10, (1, 8, 8), 360, 3, "fbpc")
    assert (facts.architectures, facts.overrides) == (("convnet-in", "convnet-bn"), {"width": 8})
    assert (facts.views, facts.draws, facts.trained) == (1, 1, None)
    costly = facts_of(small.updated(views=8, draws_per_step=3), digits, SizeRequest())
    assert (costly.views, costly.draws) == (8, 3)
    changes = {"ipc": 3, "inference": "ensemble", "ensemble_size": 4, "net_steps": 70}
    for more, batch in (({}, 60), ({"net_mirror": False}, 30), ({"chain_full_batch": 59, "chain_batch_size": 7}, 7)):
        trained = facts_of(small.updated(**changes, **more), digits, SizeRequest()).trained
        assert trained == (4, 70, batch)
