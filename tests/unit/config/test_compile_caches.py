from __future__ import annotations

from pathlib import Path

from megatron_oreal.config.compile_caches import cache_variables, compiler_versions


def test_each_set_of_versions_has_a_folder_of_its_own() -> None:
    found = cache_variables({"MEGATRON_OREAL_CACHE": "/c"}, {"vllm": "0.26.0", "torch": "2.11.0"})
    folder = "/c/torch-2.11.0_vllm-0.26.0"
    assert found == {
        "VLLM_CACHE_ROOT": f"{folder}/vllm",
        "TRITON_CACHE_DIR": f"{folder}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
    }


def test_what_is_set_stays_and_without_a_folder_nothing_is_set() -> None:
    own = {"MEGATRON_OREAL_CACHE": "~/c", "VLLM_CACHE_ROOT": "/mine", "TRITON_CACHE_DIR": ""}
    found = cache_variables(own, {"torch": "2.11.0"})
    assert found.keys() == {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
    assert found["TRITON_CACHE_DIR"] == str(Path.home() / "c/torch-2.11.0/triton")
    assert cache_variables({}, {"torch": "2.11.0"}) == {}


def test_the_versions_are_those_that_are_installed() -> None:
    assert {"python", "torch"} <= compiler_versions().keys()
