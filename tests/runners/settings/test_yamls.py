"""Files read by libyaml's parser are what OmegaConf's own makes of them."""

from pathlib import Path

import omegaconf._utils
import pytest
import yaml
from omegaconf import OmegaConf

from methods.core.home import ROOT
from runners.settings import yamls

FILES = sorted((ROOT / "conf").rglob("*.yaml"))
TEXTS = (
    "a: 1e-3\nb: 1_000\nc: 012\nd: 2026-11-30\ne: .5\nf: 1:30\ng: yes\nh: ~\ni: '1'\nj: [1., -.inf, 0x1f]",
    "a: &x {k: 1}\nb: *x\nc:\n  <<: *x\n  l: |\n    two\n    lines\n",
    "${x}: 1\n1: 2\ntrue: 3\nq: ${oc.env:HOME}\nü: 'é'",
    "",
)


def slow(text: str):
    return yaml.load(text, Loader=yamls._GET_SLOW())


def same(ours: object, theirs: object) -> bool:
    return repr(ours) == repr(theirs)  # 1, 1.0 and True are equal, their texts are not


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda folder: folder.name)
def test_every_file_of_the_configuration_means_what_it_meant(folder):
    for path in FILES:
        if path.parent == folder:
            text = path.read_text(encoding="utf-8")
            assert same(yaml.load(text, Loader=yamls.fast_loader()), slow(text)), path


@pytest.mark.parametrize("text", TEXTS)
def test_numbers_dates_and_anchors_are_read_alike(text):
    assert same(yaml.load(text, Loader=yamls.fast_loader()), slow(text))


@pytest.mark.parametrize(
    "text", ["a: 1\nb: {c: 1, c: 2}\n", "a: [1", "a: b: c", "\ta: 1", "a: *x", "a: !x 1", "a: \x07"]
)
def test_what_cannot_be_read_is_said_in_the_same_words(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "own.yaml").write_text(text)
    said = []
    for loader in (yamls._GET_SLOW, yamls.fast_loader):
        monkeypatch.setattr("omegaconf._utils.get_yaml_loader", loader)
        for given in (tmp_path / "own.yaml", None):
            with pytest.raises(yaml.YAMLError) as error:
                OmegaConf.load(given) if given else yaml.load(text, Loader=loader())
            said.append(str(error.value))
    assert said[:2] == said[2:] and str(tmp_path) in said[0]


def test_the_parser_is_libyamls_once_it_is_installed(monkeypatch):
    monkeypatch.setattr("omegaconf._utils.get_yaml_loader", yamls._GET_SLOW)
    yamls.install()
    assert omegaconf._utils.get_yaml_loader is yamls.fast_loader
    assert issubclass(yamls.fast_loader(), yaml.cyaml.CParser)
