"""The config of `export`: which model is written as a folder for browsers."""

from pydantic import field_validator

from ddpm_pipe.config import Config, Listed, Place


class ExportConfig(Config):
    """What to export"""

    model: Place
    """a pipeline folder, or the id of a repository on the Hub"""
    revision: str | None = None
    """branch, tag or commit of a model on the Hub"""
    output_dir: Place
    """the folder of the network and its page; an earlier export in it is replaced"""
    onnx: bool = True
    """whether to write the network as ONNX, the only format that there is"""
    title: str | None = None
    """heading of the page; the name of the run or of the repository if not given"""
    class_names: Listed[str] = []
    """names of the classes, in order; those of the run or the model card if not given"""
    runtime: Place | None = None
    """the npm package of onnxruntime-web as a .tgz file; it is fetched from the npm registry if not given"""

    @field_validator("onnx")
    @classmethod
    def _some_format(cls, onnx: bool) -> bool:
        if not onnx:
            raise ValueError("onnx=false leaves nothing to export, since ONNX is the only format.")
        return onnx
