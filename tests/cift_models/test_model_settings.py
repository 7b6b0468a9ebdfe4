"""Settings of the models: each key reaches the part that it names, and what nothing reads is refused by name."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
from test_inference import INSTRUMENTS, quotes, source

from catalog.errors import InputError
from cift_models import artifacts, settings
from cift_models.ensemble import MEMBERS, Ensemble, member_class
from cift_models.labels import H
from cift_models.train import Config, train
from cift_models.windows import Votes

OWN = f"{__name__}:Constant"


@dataclasses.dataclass(frozen=True)
class Config_:
    up: float = 0.5
    seen: int = 0


class Constant:
    """A member of the user's own, which has settings."""

    name = "constant"

    def __init__(self, up):
        self.up = up

    class Seen:
        def __init__(self, config):
            self.config = config

        def push(self, block):
            """Nothing of the stream is needed."""

    @staticmethod
    def gatherer(instruments, names, config=None):
        return Constant.Seen(config)

    @classmethod
    def fit(cls, study, gathered, config=None):
        assert gathered.config is config
        return cls(config.up)

    def new_state(self):
        return None

    def predict(self, block, state):
        m = len(block.closes)
        return Votes(np.tile([0.0, 1 - self.up, self.up], (m, H, 1)), np.ones((m, H)))

    def save(self, folder):
        np.save(folder / "constant.npy", self.up)

    @classmethod
    def load(cls, folder, names):
        return cls(float(np.load(folder / "constant.npy")))


Config_.__name__, Constant.Config = "Config", Config_
sys.modules[__name__].Config, TrainConfig = Config_, Config  # the module's own Config is the member's


def test_every_member_of_the_project_has_settings_that_can_be_told():
    found = settings.of_members({}, MEMBERS)
    assert found.keys() == MEMBERS.keys()
    for name, config in found.items():
        told = settings.plain(config)
        again = settings.of_members({name: told}, MEMBERS)[name]
        assert settings.plain(again) == told and type(again) is settings.config_class(MEMBERS[name])


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"gnn": {"stepz": 1}}, r"\[gnn\] stepz is no setting: choose among .*steps"),
        ({"gnn": {"steps": 0}}, r"\[gnn\] steps: .*greater than or equal to 1"),
        ({"gnn": {"rate": -1.0}}, r"\[gnn\] rate: .*greater than or equal to 0"),
        ({"hmm": {"floor": float("nan")}}, r"\[hmm\] floor: .*finite"),
        ({"transformer": {"epochs": "six"}}, r"\[transformer\] epochs: .*integer"),
        ({"transformer": {"epochs": True}}, r"\[transformer\] epochs: .*integer"),
        ({"transformer": {"width": 33}}, r"\[transformer\] width 33 must be a multiple"),
        ({"transformer": {"device": "tpu"}}, r"\[transformer\] device: .*'cuda'"),
        ({"transformer": {"checkpoint": "x"}}, r"\[transformer\] checkpoint is no setting"),
        ({"hawkes": {"decays": 99}}, r"\[hawkes\] decays: .*less than or equal to 8"),
        ({"fusion": {"depth": [1]}}, r"\[fusion\] depth: .*integer"),
        ({"lstm": {}}, r"\[lstm\] is for no member that is trained: choose among hawkes"),
    ],
)
def test_what_is_wrong_is_refused_by_place(tables, said):
    with pytest.raises(InputError, match=said):
        settings.of_members(tables, MEMBERS)


def test_a_file_is_read_as_tables(tmp_path):
    file = tmp_path / "how.toml"
    file.write_text("[train]\nfolds = 2\n[fusion]\npatience = 0\n")
    assert settings.read(file) == {"train": {"folds": 2}, "fusion": {"patience": 0}}
    for text, said in (("folds = 2\n", "folds stands in no table"), ("[train\n", "not valid TOML")):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            settings.read(file)
    with pytest.raises(InputError, match="cannot read"):
        settings.read(tmp_path / "none.toml")


@pytest.mark.parametrize("how", [{"shares": (0.5, 0.5, 0.5)}, {"shares": (1.0, 0.5, -0.5)}, {"folds": 0}, {"seeds": 0}, {"embargo_ns": -1}])
def test_training_cannot_be_set_to_nonsense(how):
    with pytest.raises(InputError):
        TrainConfig(**how)


def test_what_is_set_reaches_fit_and_gatherer_of_ones_own_member_and_the_ensemble(tmp_path):
    tables = {"constant": {"up": 0.25}, "ensemble": {"agree": 0.9, "kelly": 0.1}}
    out = train(source(quotes(7, 5_000)), out=tmp_path / "a", members=[], own=[OWN], config=TrainConfig(cap=5_000), tables=tables)
    told = artifacts.read(out).manifest["settings"]
    assert member_class(OWN).load(out, ()).up == 0.25 and told["constant"] == {"up": 0.25, "seen": 0}
    assert Ensemble.load(out).config.agree == 0.9 and told["ensemble"]["kelly"] == 0.1 and told["train"]["cap"] == 5_000
    with pytest.raises(InputError, match=r"\[ensemble\] agri is no setting"):
        train(source(quotes(7, 300)), out=tmp_path / "b", members=[], own=[OWN], tables={"ensemble": {"agri": 1}})
    assert len(INSTRUMENTS) == 2
