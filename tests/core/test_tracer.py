"""Tracing: every way to give inputs, where each node comes from, and nothing that changes."""

from __future__ import annotations

import copy
import dataclasses
import math
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision_models import torchvision_model
from toys import (
    LeNet,
    after,
    basic_net,
    image,
    lenet,
    nested_inputs,
    nested_model,
    preactivation_net,
    seeded,
    traced,
)
from tracing import same

import fxq
from fxq.arguments import example_arguments
from fxq.errors import TraceError
from fxq.graph import origin, state, tensor_info
from fxq.passes import Canonicalize, DropIdentities, ExpandModules, Functionalize
from fxq.tracing.recorder import user_frame

NORMALIZE = (Functionalize(), ExpandModules(), Canonicalize(), DropIdentities())


class TestInputs:
    """Whatever forward takes."""

    def test_a_tensor_a_tuple_and_a_dict(self) -> None:
        x = image(2, 1, 28, 28)
        for given in (x, (x,), [x], {"x": x}):
            same(fxq.trace(lenet(), given), lenet(), x)
        assert example_arguments(None, {"x": x}) == ((), {"x": x})
        with pytest.raises(TraceError, match="example_inputs hold no tensor"):
            example_arguments((1, "a"))

    def test_nested(self) -> None:
        inputs = nested_inputs()
        gm = traced(nested_model(), *inputs)
        assert [n.name for n in gm.graph.nodes if n.op == "placeholder"] == [
            "named_a",
            "named_b",
            "pair_0",
            "pair_1",
        ]
        same(gm, nested_model(), *inputs)
        same(gm, nested_model(), named=inputs[0], pair=inputs[1])
        same(after(NORMALIZE, nested_model(), *inputs), nested_model(), *inputs)
        by_name = traced(nested_model(), named=inputs[0], pair=inputs[1])
        same(by_name, nested_model(), *inputs)

    def test_nested_with_what_is_no_tensor(self) -> None:
        class Mixed(nn.Module):
            def forward(self, items: list[Any], more: dict[str, Any]) -> Any:
                return items[0] * items[1] + (0 if items[2] is None else 1), {"x": more["x"][0] + more["y"]}

        inputs = ([image(2), 3, None], {"x": (image(2), "text"), "y": 2.5})
        same(traced(Mixed(), *inputs), Mixed(), *inputs)

    def test_keyword_only_defaults_and_several(self) -> None:
        class Many(nn.Module):
            def forward(self, x: Tensor, scale: float = 2.0, *, mask: Tensor | None = None, shift: Any = 1) -> Any:
                x = x * scale + shift
                return x if mask is None else x * mask

        x, mask = image(2, 3), image(2, 3, seed=1)
        same(traced(Many(), x), Many(), x)
        gm = traced(Many(), x, mask=mask)
        same(gm, Many(), x, mask=mask)
        assert state(gm).example_kwargs.keys() == {"mask"}
        gm = traced(Many(), x, 3.0, mask=mask, shift=2)
        with torch.no_grad():
            torch.testing.assert_close(gm(x, mask=mask), Many()(x, 3.0, mask=mask, shift=2), rtol=0, atol=0)
        (held,) = state(gm).example_args
        assert held is x

    def test_concrete_args(self) -> None:
        class Flagged(nn.Module):
            def forward(self, x: Tensor, double: bool, y: Tensor | None = None) -> Tensor:
                if double:
                    x = x * 2
                return x if y is None else x + y

        x, y = image(2), image(2, seed=1)
        gm = traced(Flagged(), x, options={"concrete_args": {"double": True}})
        torch.testing.assert_close(gm(x), x * 2)
        double = False  # concrete_args win over the example
        gm = traced(Flagged(), x, double, y, options={"concrete_args": {"double": True}})
        torch.testing.assert_close(gm(x, y), x * 2 + y)
        assert len(state(gm).example_args) == 2
        gm = traced(Flagged(), x, double, y, options={"concrete_args": {"y": None}})
        torch.testing.assert_close(gm(x), x)
        with pytest.raises(
            TraceError, match=r"concrete_args names dubble, which Flagged.forward does not take"
        ) as error:
            traced(Flagged(), x, options={"concrete_args": {"dubble": True}})
        assert error.value.hint == "it takes x, double, y"

    def test_inputs_that_do_not_fit(self) -> None:
        with pytest.raises(TraceError, match=r"example inputs do not fit LeNet.forward.*too many positional"):
            traced(lenet(), image(1), image(1))
        with pytest.raises(
            TraceError, match=r"(?s)does not run on the example inputs.*module: conv1.*test_tracer|toys"
        ):
            traced(lenet(), image(2, 3, 28, 28))

        class Star(nn.Module):
            def forward(self, *tensors: Tensor) -> Tensor:
                return tensors[0] + tensors[1]

        with pytest.raises(TraceError, match=r"takes \*tensors, which has no fixed inputs"):
            traced(Star(), image(1), image(1))

    def test_nested_outputs(self) -> None:
        class Out(nn.Module):
            def forward(self, x: Tensor) -> Any:
                return {"a": [x, (x + 1, None)], "b": x.split(1)}

        same(traced(Out(), image(2, 3)), Out(), image(2, 3))


class TestOrigins:
    """Each node knows its module, its line and its shape."""

    def test_residual_network(self) -> None:
        gm = traced(basic_net(), image(2, 3, 16, 16))
        nodes = {n.name: n for n in gm.graph.nodes}
        conv, add = nodes["blocks_0_conv1"], nodes["blocks_0_add"]
        assert (origin(conv).module_path, origin(conv).call) == ("blocks.0.conv1", True)
        assert origin(conv).module_type is nn.Conv2d
        assert origin(conv).code == "out = self.relu(self.bn1(self.conv1(x)))"
        assert (origin(add).module_path, origin(add).code, origin(add).call) == (
            "blocks.0",
            "out += identity",
            False,
        )
        assert [t.__name__ for t in origin(add).module_types] == ["ResidualNet", "Sequential", "BasicBlock"]
        info = tensor_info(add)
        assert info is not None
        assert (info.shape, info.dtype) == ((2, 8, 16, 16), torch.float32)
        file, _, number = (origin(add).source or "").rpartition(":")
        assert Path(file).name == "toys.py"
        assert Path(file).read_text().splitlines()[int(number) - 1].strip() == "out += identity"

    def test_every_node_of_a_model_has_one(self) -> None:
        for n in traced(lenet(), image(2, 1, 28, 28)).graph.nodes:
            if n.op not in ("placeholder", "output"):
                assert origin(n).source is not None, n.name
                assert n.name == "size" or tensor_info(n) is not None

    def test_a_module_called_twice_is_two_nodes(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self.fc(torch.relu(self.fc(x)))

        gm = traced(seeded(Twice), image(2, 3))
        assert [n.name for n in gm.graph.nodes if n.op == "call_module"] == ["fc", "fc_1"]

    def test_frames(self) -> None:
        torch_file = f"{Path(torch.__file__).parent}/nn/modules/conv.py"
        fxq_file = f"{Path(fxq.__file__).parent}/tracer.py"
        inner = [(torch_file, 3), (fxq_file, 4), ("<eval_with_key>.3", 1), ("<string>", 1)]
        for cell in (
            "/tmp/ipykernel_12/345.py",
            "<ipython-input-3-ab12>",
            "C:\\Temp\\ipykernel_9\\1.py",
            "/home/me/net.py",
        ):
            assert user_frame([*inner, (cell, 7), ("/other.py", 8)]) == (cell, 7)
        assert user_frame(inner) is None

    def test_notebook_cells(self) -> None:
        """A cell has no file, only an entry in linecache, as IPython makes it."""
        import linecache

        source = "class Cell(nn.Module):\n    def forward(self, x):\n        return torch.relu(x) + 1\n"
        name = "/tmp/ipykernel_7/1234.py"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        space: dict[str, Any] = {"nn": nn, "torch": torch, "__name__": "__main__"}
        exec(compile(source, name, "exec"), space)
        try:
            gm = traced(space["Cell"](), image(2))
        finally:
            del linecache.cache[name]
        add = next(n for n in gm.graph.nodes if n.name == "add")
        assert (origin(add).source, origin(add).code) == (f"{name}:3", "return torch.relu(x) + 1")


class TestNothingChanges:
    """The model is as it was, and shares nothing with the graph."""

    @pytest.mark.parametrize("train", [True, False])
    def test_model(self, *, train: bool) -> None:
        model = preactivation_net(norm=True).train(train)
        held = copy.deepcopy(model.state_dict())
        x = image(2, 3, 8, 8)
        gm = fxq.prepare(model, x)
        assert all(m.training is train for m in model.modules())
        assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())
        mine = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
        assert not mine & {t.untyped_storage().data_ptr() for t in gm.state_dict().values() if t.numel()}
        assert all(m.inplace for m in model.modules() if isinstance(m, nn.ReLU) and m is not model[3])
        assert not any(m.training for m in gm.modules())

    def test_inputs(self) -> None:
        class Writes(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                x.add_(1)
                return x[x > 0]  # a shape that depends on values: run for real

        x = image(5)
        gm = traced(Writes(), x)
        torch.testing.assert_close(x, image(5), rtol=0, atol=0)
        assert tensor_info(next(n for n in gm.graph.nodes if n.name.startswith("getitem"))) is not None

    def test_already_traced(self) -> None:
        gm = traced(lenet(), image(1, 1, 28, 28))
        with pytest.raises(TraceError, match="traced by fxq already"):
            traced(gm, image(1, 1, 28, 28))

    def test_a_graph_module_of_plain_fx(self) -> None:
        gm = fx.symbolic_trace(lenet())
        same(traced(gm, image(1, 1, 28, 28)), lenet(), image(1, 1, 28, 28))

    def test_deepcopy_keeps_what_is_known(self) -> None:
        gm = traced(basic_net(), image(1, 3, 16, 16))
        twin = copy.deepcopy(gm)
        assert state(twin) is state(gm)
        for a, b in zip(gm.graph.nodes, twin.graph.nodes, strict=True):
            assert (a.name, origin(a), a.meta.get("tensor"), a.meta.get("aliases")) == (
                b.name,
                origin(b),
                b.meta.get("tensor"),
                b.meta.get("aliases"),
            )
        fxq_state = dataclasses.replace(state(twin), properties=frozenset())
        twin.meta["fxq"] = fxq_state
        assert state(gm).properties == {"traced"}


class TestUnusualModels:
    """Hooks, lazy and computed parameters, half precision, inference tensors, devices."""

    def test_hooks(self) -> None:
        model = seeded(lambda: nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU())))
        for module in (model, model[1], model[0]):
            module.register_forward_hook(lambda _module, _args, out: out * 2)
            module.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))
        same(traced(model, image(2, 3)), model, image(2, 3))
        same(after(NORMALIZE, model, image(2, 3)), model, image(2, 3))

    def test_lazy(self) -> None:
        model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(2))
        with pytest.raises(TraceError, match=r"(?s)0.weight has no shape yet.*run the lazy model once"):
            traced(model, image(1, 3, 5, 5))
        model(image(1, 3, 5, 5))
        same(traced(model.eval(), image(1, 3, 5, 5)), model, image(1, 3, 5, 5))

    def test_attributes_that_were_computed(self) -> None:
        class Holder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.base = nn.Parameter(torch.ones(3))
                self.scale = self.base * 2  # no leaf: plain deepcopy refuses it

            def forward(self, x: Tensor) -> Tensor:
                return x * self.scale

        same(traced(Holder(), image(2, 3)), Holder(), image(2, 3))

    def test_a_model_that_cannot_be_copied(self) -> None:
        model = nn.Sequential(nn.ReLU())
        model.handle = (i for i in range(3))
        with pytest.raises(TraceError, match=r"the model cannot be copied: cannot pickle 'generator' object"):
            traced(model, image(2))

    def test_half(self) -> None:
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            model, x = basic_net().to(dtype), image(1, 3, 16, 16).to(dtype)
            gm = traced(model, x)
            same(gm, model, x)
            info = tensor_info(next(n for n in gm.graph.nodes if n.name == "fc"))
            assert info is not None
            assert info.dtype is dtype

    def test_inference_mode(self) -> None:
        with torch.inference_mode():
            model, x = preactivation_net(), image(1, 3, 8, 8)
            gm = after(NORMALIZE, model, x)
            torch.testing.assert_close(gm(x), model(x), rtol=0, atol=0)
            fxq.prepare(model, x)

    def test_mathematics_on_sizes(self) -> None:
        class Scaled(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                n, c = x.shape
                c *= 2
                return (x / math.sqrt(x.size(-1))).reshape(n * 2, c // 4) * math.floor(n / 2)

        same(traced(Scaled(), image(4, 6)), Scaled(), image(4, 6))
        same(after(NORMALIZE, Scaled(), image(4, 6)), Scaled(), image(4, 6))
        same(traced(Scaled(), image(4, 6)), Scaled(), image(8, 10))

    def test_no_grad_and_grad_give_the_same_graph(self) -> None:
        first = traced(preactivation_net(), image(1, 3, 8, 8)).code
        with torch.no_grad():
            assert traced(preactivation_net(), image(1, 3, 8, 8)).code == first

    def test_shapes_without_memory(self) -> None:
        """Only shapes are propagated: an input that no machine could hold is fine."""
        huge = torch.empty(1).as_strided((4096, 3, 4096, 4096), (0, 0, 0, 0))
        gm = traced(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), huge)
        info = tensor_info(next(n for n in gm.graph.nodes if n.op == "call_module"))
        assert info is not None
        assert info.shape == (4096, 8, 4096, 4096)

    @pytest.mark.gpu
    def test_a_model_on_a_gpu_stays_there(self) -> None:
        model, x = preactivation_net(norm=True).cuda(), image(2, 3, 8, 8).cuda()
        gm = fxq.prepare(model, x)
        assert {t.device.type for t in gm.state_dict().values()} == {"cuda"}
        torch.testing.assert_close(gm(x), model(x), rtol=1e-4, atol=1e-4)
        assert {t.device.type for t in model.state_dict().values()} == {"cuda"}


def test_the_trace_does_not_depend_on_who_calls() -> None:
    """Frames outside the traced model are nobody's origin."""
    module = types.ModuleType("elsewhere")
    module.__dict__["traced"] = traced
    exec("def call(model, x):\n    return traced(model, x)\n", module.__dict__)
    gm = module.call(LeNet().eval(), image(1, 1, 28, 28))
    assert {Path((origin(n).source or "").rpartition(":")[0]).name for n in gm.graph.nodes if origin(n).source} == {
        "toys.py"
    }


TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "alexnet": (64, {}),
    "convnext_tiny": (32, {}),
    "densenet121": (32, {}),
    "efficientnet_b0": (32, {}),
    "googlenet": (64, {"aux_logits": True, "init_weights": False}),
    "inception_v3": (96, {"aux_logits": True, "init_weights": False}),
    "mnasnet0_5": (32, {}),
    "mobilenet_v2": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "regnet_y_400mf": (32, {}),
    "resnet18": (32, {}),
    "resnext50_32x4d": (32, {}),
    "shufflenet_v2_x0_5": (32, {}),
    "squeezenet1_1": (64, {}),
    "swin_t": (32, {}),
    "vgg11_bn": (32, {}),
    "vit_b_16": (32, {"image_size": 32}),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    size, options = TORCHVISION[name]
    model, x = torchvision_model(name, num_classes=10, **options), image(2, 3, size, size)
    with torch.no_grad():
        expected = model(x.clone())
        gm = traced(model, x)
        torch.testing.assert_close(gm(x.clone()), expected, rtol=0, atol=0)
        normal = after(NORMALIZE, model, x)
        torch.testing.assert_close(normal(x), expected, rtol=1e-5, atol=1e-5)
    assert not [n for n in normal.graph.nodes if n.op == "call_method" and str(n.target).endswith("_")]
