"""Masked language models from folders: their own logits, padding, foreign code, SEDD, refusals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    PreTrainedTokenizerFast,
)

from rtb_rl.adapters.masked_lm import MaskedLM, load_masked_lm, masked_lm
from rtb_rl.adapters.sedd import Sedd, SeddSettings
from rtb_rl.core import (
    IndependentReveals,
    Infilling,
    MaskedDiffusion,
    linear_masking,
    log_ratio,
    rollout,
)
from rtb_rl.errors import InputError

WORDS = ["[PAD]", "[UNK]", "[MASK]", "the", "cat", "sat", "on", "a", "mat"]
PAD, MASK, WIDTH = 0, 2, 12  # three rows of the embedding belong to no word

MDLM = '''
import torch, transformers
from transformers.modeling_outputs import MaskedLMOutput

open({ran!r}, "w").close()

class MDLMConfig(transformers.PretrainedConfig):
    model_type = "mdlm"
    def __init__(self, vocab_size=10, model_length=16, time_conditioning=False, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.model_length = vocab_size, model_length
        self.time_conditioning = time_conditioning

class MDLM(transformers.PreTrainedModel):
    """Written for transformers 4: no post_init, a tensor where return_dict is False."""
    config_class, base_model_prefix = MDLMConfig, "mdlm"
    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.vocab_size, 4)
        self.head = torch.nn.Linear(4, config.vocab_size)
        self.dropout = torch.nn.Dropout(0.5)
    def forward(self, input_ids=None, timesteps=None, output_hidden_states=None, return_dict=None):
        self.given = timesteps
        assert timesteps.shape == input_ids.shape[:1]
        return_dict = self.config.return_dict if return_dict is None else return_dict
        logits = self.head(self.dropout(self.embed(input_ids)) + timesteps[:, None, None])
        return MaskedLMOutput(logits=logits) if return_dict else logits
'''

LLADA = """
import torch, transformers
from transformers.modeling_outputs import CausalLMOutputWithPast

class LLaDAConfig(transformers.PretrainedConfig):
    model_type = "llada"
    def __init__(self, embedding_size=12, max_sequence_length=24, **kwargs):
        super().__init__(**kwargs)
        self.embedding_size, self.max_sequence_length = embedding_size, max_sequence_length

class LLaDAModelLM(transformers.PreTrainedModel):
    config_class, base_model_prefix = LLaDAConfig, "model"
    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(config.embedding_size, 4)
        self.head = torch.nn.Linear(4, config.embedding_size, bias=False)
    def forward(self, input_ids=None, attention_mask=None, return_dict=None):
        assert attention_mask is None, "its pad token is the end of a text"
        logits = self.head(self.embed(input_ids))
        return CausalLMOutputWithPast(logits=logits) if return_dict else (logits,)
"""


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Foreign code is copied into a folder of the test's own before it is imported."""
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)


def words(count: int = len(WORDS), **special: str) -> PreTrainedTokenizerFast:
    model = models.WordLevel({w: i for i, w in enumerate(WORDS[:count])}, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def usual_words() -> PreTrainedTokenizerFast:
    return words(pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]", model_max_length=14)


def shaken(module: nn.Module) -> Any:
    """Every parameter from a generator of its own."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return module


def bert(kind: Any = BertForMaskedLM, **config: Any) -> Any:
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 16, "max_position_embeddings": 20, "vocab_size": WIDTH}
    return shaken(kind(BertConfig(**{**sizes, **more, **config}))).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A BERT with its tokenizer, as save_pretrained writes them."""
    bert().save_pretrained(tmp_path / "bert")
    usual_words().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def foreign(folder: Path, code: str, auto: str, config: dict[str, Any], **weights: Tensor) -> Path:
    """A repository with code of its own, in the file model.py."""
    folder.mkdir()
    (folder / "model.py").write_text(code)
    kind = {"mdlm": "MDLM", "llada": "LLaDA"}[config["model_type"]]
    name = {"mdlm": "MDLM", "llada": "LLaDAModelLM"}[config["model_type"]]
    auto_map = {"AutoConfig": f"model.{kind}Config", auto: f"model.{name}"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    save_file(weights, folder / "model.safetensors")
    return folder


def new_mdlm(tmp_path: Path, **config: Any) -> Path:
    code = MDLM.format(ran=str(tmp_path / "code ran"))
    config = {"model_type": "mdlm", "vocab_size": 10, "return_dict": False, **config}
    layers = nn.ModuleDict({"embed": nn.Embedding(10, 4), "head": nn.Linear(4, 10)})
    return foreign(
        tmp_path / "mdlm", code, "AutoModelForMaskedLM", config, **shaken(layers).state_dict()
    )


def new_llada(tmp_path: Path, **config: Any) -> Path:
    ends = {"mask_token_id": 9, "pad_token_id": 1, "eos_token_id": 1}
    layers = nn.ModuleDict({"embed": nn.Embedding(12, 4), "head": nn.Linear(4, 12, bias=False)})
    return foreign(
        tmp_path / "llada",
        LLADA,
        "AutoModel",
        {"model_type": "llada", **ends, **config},
        **shaken(layers).state_dict(),
    )


def renormalised(logits: Tensor, left_out: list[int]) -> Tensor:
    """softmax over the other tokens, by hand."""
    weight = logits.double().exp()
    weight[..., left_out] = 0
    return weight / weight.sum(-1, keepdim=True)


def levels(x: Tensor) -> Tensor:
    return torch.ones(len(x), dtype=torch.int64)


def test_log_probs_are_the_models_own(folder: Path) -> None:
    """Renormalised without the mask and the ids that no word has."""
    model = load_masked_lm(folder)
    assert (model.mask, model.pad, model.window, model.vocabulary) == (MASK, PAD, 14, WIDTH)
    assert model.never == (9, 10, 11) and model.largest_sigma is None
    assert model.tokenizer("the cat sat")["input_ids"] == [3, 4, 5]
    x = torch.tensor([[3, 4, MASK, 6], [MASK, MASK, 5, 1]])
    with torch.no_grad():
        law = model.denoiser()(x, levels(x), None)
        logits = AutoModelForMaskedLM.from_pretrained(folder).eval()(x).logits
    assert law.dtype == torch.float32
    expected = renormalised(logits, [MASK, 9, 10, 11])
    torch.testing.assert_close(law.exp().double(), expected, rtol=1e-5, atol=1e-7)
    assert (expected[..., 3] > 0.01).any()


def test_pads_change_nothing(folder: Path) -> None:
    model = load_masked_lm(folder)
    x = torch.tensor([[3, MASK, 5, 6]])
    for pads in (1, 4):
        padded = torch.cat([x, torch.full((1, pads), PAD)], 1)
        with torch.no_grad():
            short = model.denoiser()(x, levels(x), None)
            long = model.denoiser()(padded, levels(x), None)[:, :4]
            seen = model.network.model(padded).logits[:, :4]
        torch.testing.assert_close(long, short, rtol=1e-5, atol=1e-5)
        assert (renormalised(seen, [MASK, 9, 10, 11]) - short.exp()).abs().max() > 1e-3


def test_evaluation_mode_and_float32(folder: Path) -> None:
    """Also of a checkpoint in half precision, and of a model at hand that was being trained."""
    bert().to(torch.bfloat16).save_pretrained(folder)
    model = load_masked_lm(folder)
    assert {p.dtype for p in model.network.parameters()} == {torch.float32}
    at_hand = masked_lm(bert().train(), usual_words())
    x = torch.tensor([[3, MASK, 5, 6]])
    first, again = (at_hand.denoiser()(x, levels(x), None) for _ in range(2))
    assert torch.equal(first, again)


def test_global_generator_is_left_alone(folder: Path, tmp_path: Path) -> None:
    new_sedd(tmp_path / "sedd", "model.safetensors")
    source = new_mdlm(tmp_path)
    before = torch.get_rng_state()
    load_masked_lm(folder)
    load_masked_lm(tmp_path / "sedd")
    load_masked_lm(source, trust_remote_code=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_rollout_infills(folder: Path) -> None:
    """Free positions get words, context stays, and a copy of the prior has log-ratio zero."""
    model = load_masked_lm(folder)
    schedule = linear_masking(6)
    diffusion = MaskedDiffusion(3, model.mask, IndependentReveals(schedule, 3))
    prior = Infilling(model.denoiser(schedule))
    tokens = torch.tensor([[3, 4, 0, 0, 3, 8], [3, 0, 0, 7, 8, PAD]]).repeat(20, 1)
    free = torch.tensor([[2, 3, -1], [1, 2, -1]]).repeat(20, 1)
    condition = {"tokens": tokens, "free": free}
    with torch.no_grad():
        path = rollout(diffusion, prior, condition, 40, generator=torch.Generator().manual_seed(0))
        ratio = log_ratio(diffusion, prior, prior, path)
    drawn = path.x[0][:, :2]
    assert (path.x[-1] == MASK).all() and (path.x[0][:, 2] == 0).all()
    assert (drawn != MASK).all() and (drawn < len(WORDS)).all() and len(drawn.unique()) > 3
    assert (ratio == 0).all()


def test_foreign_code_runs_only_where_trusted(tmp_path: Path) -> None:
    source = new_mdlm(tmp_path)
    with pytest.raises(InputError, match="trust_remote_code=True") as refusal:
        load_masked_lm(source)
    assert "model.MDLM" in str(refusal.value) and not (tmp_path / "code ran").exists()
    load_masked_lm(source, trust_remote_code=True)
    assert (tmp_path / "code ran").exists()


def test_code_that_transformers_has_needs_no_trust(folder: Path) -> None:
    """A checkpoint older than its class in transformers still carries its own code; none runs."""
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "model.Bert", "AutoModelForMaskedLM": "model.Bert"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    for trust in (False, True):
        model = load_masked_lm(folder, trust_remote_code=trust)
        assert type(model.network.model) is BertForMaskedLM


def test_mdlm_gets_zero_timesteps(tmp_path: Path) -> None:
    """Its mask is the last id, beyond the words of the tokenizer named for it."""
    words(9).save_pretrained(tmp_path / "words")
    model = load_masked_lm(new_mdlm(tmp_path), tokenizer=tmp_path / "words", trust_remote_code=True)
    assert (model.mask, model.pad, model.window, model.vocabulary) == (9, None, 16, 10)
    assert model.never == () and model.tokenizer("cat")["input_ids"] == [4]
    x = torch.tensor([[3, 9, 9, 4], [9, 9, 1, 2]])
    with torch.no_grad():
        law = model.denoiser(linear_masking(4))(x, torch.tensor([2, 4]), None)
    assert model.network.model.given.tolist() == [0, 0]
    weights = load_file(tmp_path / "mdlm" / "model.safetensors")
    logits = weights["embed.weight"][x] @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(law.exp().double(), renormalised(logits, [9]), rtol=1e-5, atol=1e-7)


def test_mdlm_without_tokenizer(tmp_path: Path) -> None:
    """transformers would make up a tokenizer; every id of the network counts."""
    model = load_masked_lm(new_mdlm(tmp_path), trust_remote_code=True)
    assert model.tokenizer is None and model.never == () and model.mask == 9


def test_mdlm_with_time_conditioning_gets_sigma(tmp_path: Path) -> None:
    model = load_masked_lm(new_mdlm(tmp_path, time_conditioning=True), trust_remote_code=True)
    with pytest.raises(InputError, match="takes a schedule"):
        model.denoiser()
    x = torch.full((3, 2), 9)
    model.denoiser(linear_masking(4))(x, torch.tensor([4, 2, 1]), None)
    given = model.network.model.given
    assert given.dtype == torch.float32
    assert given.tolist() == pytest.approx([6.907755, 0.693147, 0.287682])


@pytest.mark.parametrize("shards", [1, 2])
def test_llada(tmp_path: Path, shards: int) -> None:
    """No time; the mask is in the config; its pad token ends texts and is attended to."""
    source = new_llada(tmp_path)
    weights = load_file(source / "model.safetensors")
    if shards == 2:
        (source / "model.safetensors").unlink()
        names = {name: f"model-{i}-of-2.safetensors" for i, name in enumerate(weights)}
        for name, file in names.items():
            save_file({name: weights[name]}, source / file)
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    model = load_masked_lm(source, trust_remote_code=True)
    assert (model.mask, model.pad, model.window, model.vocabulary) == (9, None, 24, 12)
    x = torch.tensor([[1, 9, 3, 1]])
    with torch.no_grad():
        law = model.denoiser()(x, levels(x), None)
    logits = weights["embed.weight"][x] @ weights["head.weight"].T
    torch.testing.assert_close(law.exp().double(), renormalised(logits, [9]), rtol=1e-5, atol=1e-7)


def test_mask_token_missing_or_outside(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path / "bert")
    words(pad_token="[PAD]").save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="without mask token: neither .* mask="):
        load_masked_lm(tmp_path / "bert")
    assert load_masked_lm(tmp_path / "bert", mask=2).mask == 2
    for outside in (-1, WIDTH):
        with pytest.raises(InputError, match=f"mask token {outside} is none of the 12 tokens"):
            load_masked_lm(tmp_path / "bert", mask=outside)


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    bert(vocab_size=8).save_pretrained(folder)
    with pytest.raises(InputError, match="ids up to 8, the network 8 tokens"):
        load_masked_lm(folder)
    with pytest.raises(InputError, match="no tokenizer in"):
        load_masked_lm(folder, tokenizer=folder / "nowhere")


@pytest.mark.parametrize("source", ["nobody/nothing", "no such folder/at/all", "nothing"])
def test_no_such_model(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="a folder .* network connection") as refusal:
        load_masked_lm(source)
    assert repr(source) in str(refusal.value) and "\n" not in str(refusal.value)


def test_folders_that_hold_something_else(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        load_masked_lm(tmp_path / "empty")
    GPT2Config(vocab_size=9, n_embd=4, n_layer=1, n_head=1).save_pretrained(tmp_path / "gpt")
    with pytest.raises(InputError, match="GPT2Config"):
        load_masked_lm(tmp_path / "gpt")
    bert(BertModel).save_pretrained(folder)
    with pytest.raises(InputError, match=r"lacks \d+ weights of BertForMaskedLM"):
        load_masked_lm(folder)
    with pytest.raises(InputError, match="BertModel returns no logits"):
        masked_lm(bert(BertModel), usual_words())
    (new_llada(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no weights"):
        load_masked_lm(tmp_path / "llada", trust_remote_code=True)


def test_foreign_models_that_cannot_be_used(tmp_path: Path) -> None:
    source = new_llada(tmp_path)
    save_file({"embed.weight": torch.ones(12, 4)}, source / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks 1 weights of LLaDAModelLM \(head.weight"):
        load_masked_lm(source, trust_remote_code=True)
    (source / "model.py").write_text("import a_package_that_nobody_has\n" + LLADA)
    with pytest.raises(InputError, match="a_package_that_nobody_has"):
        load_masked_lm(source, trust_remote_code=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "Dream"}))
    with pytest.raises(InputError, match="about the next token"):
        load_masked_lm(source, trust_remote_code=True)


SEDD = SeddSettings(tokens=9, hidden=8, blocks=2, heads=2, condition=6, length=12)


def new_sedd(folder: Path, file: str) -> Sedd:
    network = shaken(Sedd(SEDD)).eval()
    folder.mkdir()
    sizes = {"hidden_size": 8, "n_blocks": 2, "n_heads": 2, "cond_dim": 6, "length": 12}
    config = {
        "tokens": 9,
        "graph": {"type": "absorb"},
        "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
        "model": {**sizes, "scale_by_sigma": True, "dropout": 0.1},
    }
    (folder / "config.json").write_text(json.dumps(config))
    save = save_file if file == "model.safetensors" else torch.save
    save(network.state_dict(), folder / file)
    return network


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_sedd_from_a_folder(tmp_path: Path, file: str) -> None:
    """Both formats of weights; a schedule says which sigma a level has."""
    network = new_sedd(tmp_path / "sedd", file)
    words(9).save_pretrained(tmp_path / "words")
    model = load_masked_lm(tmp_path / "sedd", tokenizer=tmp_path / "words")
    assert (model.mask, model.pad, model.window, model.vocabulary) == (9, None, 12, 10)
    assert model.never == () and model.largest_sigma == pytest.approx(6.907755)
    with pytest.raises(InputError, match="takes a schedule"):
        model.denoiser()
    x = torch.tensor([[3, 9, 9, 4], [9, 9, 1, 2]])
    with torch.no_grad():
        law = model.denoiser(linear_masking(4))(x, torch.tensor([2, 4]), None)
        scores = network(x, torch.tensor([0.693147, 6.907755]))
    expected = renormalised(scores, [9])
    torch.testing.assert_close(law.exp().double(), expected, rtol=1e-4, atol=1e-6)
    assert not any(p.is_meta for p in model.network.parameters())


def test_sedd_infills(tmp_path: Path) -> None:
    new_sedd(tmp_path / "sedd", "model.safetensors")
    model: MaskedLM = load_masked_lm(tmp_path / "sedd")
    schedule = linear_masking(5)
    diffusion = MaskedDiffusion(2, model.mask, IndependentReveals(schedule, 2))
    prior = Infilling(model.denoiser(schedule))
    free = torch.tensor([[1, 3]]).repeat(10, 1)
    condition = {"tokens": torch.tensor([[3, 0, 5, 0]]).repeat(10, 1), "free": free}
    path = rollout(diffusion, prior, condition, 10, generator=torch.Generator().manual_seed(0))
    assert (path.x[-1] == 9).all() and (path.x[0] < 9).all()


def test_sedd_weights_that_do_not_fit(tmp_path: Path) -> None:
    new_sedd(tmp_path / "sedd", "model.safetensors")
    weights = load_file(tmp_path / "sedd" / "model.safetensors")
    del weights["blocks.1.attn_out.weight"]
    save_file(weights, tmp_path / "sedd" / "model.safetensors")
    with pytest.raises(InputError, match=r"blocks\.1\.attn_out\.weight"):
        load_masked_lm(tmp_path / "sedd")


def test_pickled_weights_run_nothing(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    new_sedd(tmp_path / "sedd", "pytorch_model.bin")
    torch.save({"weights": Harmful()}, tmp_path / "sedd" / "pytorch_model.bin")
    with pytest.raises(InputError, match="UnpicklingError"):
        load_masked_lm(tmp_path / "sedd")
    assert not (tmp_path / "ran").exists()


def test_without_transformers() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import rtb_rl.adapters.sedd\n"
        "from rtb_rl.errors import InputError\n"
        "try: import rtb_rl.adapters.masked_lm\n"
        "except InputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'rtb-rl[language]'" in done.stdout
