"""The robots of the locomotion tasks: Gymnasium's MuJoCo models, with another time step and other contacts where told."""

import importlib.util
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from mamljax.rl.simulation import MEASURES


def import_mujoco() -> Any:
    """Import MuJoCo; raise `ImportError` that says which extra has it, and from which version on."""
    try:
        import mujoco.batch
    except ImportError as error:
        raise ImportError('locomotion needs MuJoCo 3.17 or later and Gymnasium: pip install "mamljax[rl]"') from error
    return mujoco


def load_robot(
    name: str,
    *,
    timestep: float | None = None,
    edits: tuple[tuple[str, str, str], ...] = (),
    measures: tuple[str, ...] = (),
) -> Any:
    """Load a robot.

    Args:
        name: "half_cheetah" or "ant", a file among Gymnasium's assets.
        timestep: seconds of one step of the physics; by default the file's, 0.01.
        edits: to the file: (element, attribute, value), the element by its path.
        measures: names in `MEASURES`; some of them MuJoCo computes only where a sensor needs them, so those get a sensor.

    Returns:
        A `mujoco.MjModel`.

    Raises:
        ImportError: MuJoCo or Gymnasium is missing; the message says which extra has them.
        ValueError: the file has no such element to edit.
    """
    mujoco = import_mujoco()
    robot = ElementTree.fromstring((_assets() / f"{name}.xml").read_text())
    # MuJoCo has deprecated this attribute: it warns, also into a log file, and will refuse it in time.
    total_mass = _element(robot, "compiler").attrib.pop("settotalmass", None)
    if timestep is not None:
        _element(robot, "option").set("timestep", str(timestep))
    for path, attribute, value in edits:
        _element(robot, path).set(attribute, value)
    sensors = ElementTree.SubElement(robot, "sensor")
    for tag, attributes in filter(None, (MEASURES[name].sensor for name in measures)):
        ElementTree.SubElement(sensors, tag, attributes)
    model = mujoco.MjModel.from_xml_string(ElementTree.tostring(robot, encoding="unicode"))
    if total_mass is not None:
        mujoco.mj_setTotalmass(model, float(total_mass))
        # What MuJoCo derives from masses when it loads a model, it must derive anew.
        mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


def first_position(model: Any) -> np.ndarray:
    """Where a robot starts by its file's `init_qpos`, or by its joints' reference: [nq] float64."""
    names = [model.numeric(index).name for index in range(model.nnumeric)]
    return model.numeric("init_qpos").data.copy() if "init_qpos" in names else model.qpos0.copy()


def _element(robot: ElementTree.Element, path: str) -> ElementTree.Element:
    element = robot.find(path)
    if element is None:
        raise ValueError(f"the robot's file has no element {path!r} to change.")
    return element


def _assets() -> Path:
    gymnasium = importlib.util.find_spec("gymnasium")  # importing its environments would need a renderer's packages
    if gymnasium is None or gymnasium.origin is None:
        raise ImportError('the robots are models of Gymnasium: pip install "mamljax[rl]"')
    return Path(gymnasium.origin).parent / "envs" / "mujoco" / "assets"
