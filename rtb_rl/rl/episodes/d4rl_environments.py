"""D4RL's own tasks where no registered environment reproduces them: ant, antmaze, kitchen, pen.

Frame, physics, observation, limit and end are restored here after arXiv 2004.07219 and its code
release. The open maze is Gymnasium's but for D4RL's limit of 150 steps, half of Gymnasium's.
"""

import re
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

Wrapper = Callable[[gymnasium.Env], gymnasium.Env]
Restored = tuple[str, dict[str, Any], Wrapper | None]

D4RL_ANTMAZE = re.compile(r"antmaze-(umaze|medium|large)(-diverse|-play)?(-v[012])?")
D4RL_ANT = re.compile(r"ant(-(random|medium|expert|(medium|full)-replay|medium-expert))?(-v[012])?")
D4RL_KITCHEN = re.compile(r"kitchen-(complete|partial|mixed)(-v0)?")
D4RL_PEN = re.compile(r"pen(-(human|cloned|expert))?(-v[01])?")
D4RL_OPEN_MAZE = re.compile(r"maze2d-open(-dense)?(-v0)?")

# D4RL's evaluation mazes, first row at the smallest y: # wall, R start, G goal.
ANTMAZE_MAPS = {
    "umaze": ("AntMaze_UMaze-v4", "##### #R..# ###.# #G..# #####"),
    "medium": (
        "AntMaze_Medium-v4",
        "######## #R.##..# #..#...# ##...### #..#...# #.#..#.# #...#.G# ########",
    ),
    "large": (
        "AntMaze_Large-v4",
        "############ #R...#.....# #.##.#.#.#.# #......#...# #.####.###.# "
        "#..#.#.....# ##.#.#.#.### #..#...#.G.# ############",
    ),
}
KITCHEN_TASKS = {
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}


def d4rl_environment(env_id: str) -> Restored | None:
    """What D4RL's name of a task stands for, None for any other id.

    The registered id, options of `gymnasium.make`, and the wrapper that restores the rest, None
    where there is nothing left to restore.
    """
    if match := D4RL_ANTMAZE.fullmatch(env_id):
        registered, layout = ANTMAZE_MAPS[match[1]]
        maze_map = [[{"#": 1, ".": 0}.get(c, c.lower()) for c in row] for row in layout.split()]
        return registered, {"maze_map": maze_map[::-1]}, D4RLAntMaze
    if match := D4RL_KITCHEN.fullmatch(env_id):
        return "FrankaKitchen-v1", {"tasks_to_complete": list(KITCHEN_TASKS[match[1]])}, D4RLKitchen
    if D4RL_ANT.fullmatch(env_id):
        return "Ant-v4", {}, D4RLAnt
    if D4RL_PEN.fullmatch(env_id):
        return "AdroitHandPen-v1", {"max_episode_steps": 100}, D4RLPen
    if match := D4RL_OPEN_MAZE.fullmatch(env_id):
        registered = f"PointMaze_Open{'Dense' if match[1] else ''}-v3"
        return registered, {"max_episode_steps": 150}, None
    return None


class D4RLAntMaze(gymnasium.Wrapper):
    """D4RL's antmaze of the `-v2` tasks (29 numbers, no goal) on gymnasium-robotics' AntMaze.

    What differs there and is put back: the origin is the start cell; rows run towards larger y (by
    a map upside down); the ant moves 0.1 s a step with torques up to 30 (there 0.05 s and 150);
    start noise 0.1; the goal is drawn anew each episode within [0, 1.5] of its cell; coming within
    0.5 of it pays 1 and ends the episode.
    """

    GOAL_RADIUS = 0.5

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.maze: Any = env.unwrapped
        self.maze.position_noise_range = 0.0
        self.maze.ant_env._reset_noise_scale = 0.1
        model = self.maze.ant_env.model
        model.opt.timestep = 0.02
        model.actuator_gear[:, 0] = 30.0
        model.geom_solimp[:, :3] = 0.8, 0.8, 0.01
        self.origin = self.maze.maze.unique_reset_locations[0].copy()
        self.observation_space = spaces.Box(-np.inf, np.inf, (29,), np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        observation, metrics = self.env.reset(seed=seed, options=options)
        random = self.maze.np_random
        self.maze.goal = self.maze.goal + random.uniform(0, 1, 2) + random.uniform(0, 0.5, 2)
        self.maze.update_target_site_pos()
        return self._flat(observation), metrics

    def step(self, action: Any):
        observation, _, _, truncated, metrics = self.env.step(action)
        distance = np.linalg.norm(observation["achieved_goal"] - self.maze.goal)
        reached = bool(distance <= self.GOAL_RADIUS)
        return self._flat(observation), float(reached), reached, truncated, metrics

    def _flat(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        position = observation["achieved_goal"] - self.origin
        return np.concatenate([position, observation["observation"]])


class D4RLAnt(gymnasium.ObservationWrapper):
    """D4RL's ant: the 27 numbers of Ant-v4 and 84 contact forces that its simulator left at 0."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.observation_space = spaces.Box(-np.inf, np.inf, (111,), np.float64)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.concatenate([observation, np.zeros(84)])


class D4RLKitchen(gymnasium.ObservationWrapper):
    """D4RL's kitchen: 9 joint positions, 21 object positions, 30 of the goal (0 outside the tasks).

    FrankaKitchen-v1 observes 59 other numbers: joint and object positions and velocities, no goal.
    Physics and reward (1 for each task when first completed; the last ends the episode) are its.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        from gymnasium_robotics.envs.franka_kitchen import kitchen_env  # pyright: ignore

        kitchen: Any = env.unwrapped
        self.goal = np.zeros(30)
        for task, values in kitchen.goal.items():
            self.goal[kitchen_env.OBS_ELEMENT_INDICES[task]] = values
        self.observation_space = spaces.Box(-np.inf, np.inf, (60,), np.float64)

    def observation(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        joints = observation["observation"]
        return np.concatenate([joints[:9], joints[18:39], self.goal])


class D4RLPen(gymnasium.Wrapper):
    """D4RL's pen: dropping it ends the episode. AdroitHandPen-v1 goes on; all else is the same."""

    HEIGHT = 26  # place of the pen's height (m) in the observation
    DROPPED = 0.075

    def step(self, action: Any):
        observation, reward, terminated, truncated, metrics = self.env.step(action)
        dropped = bool(observation[self.HEIGHT] < self.DROPPED)
        return observation, reward, terminated or dropped, truncated, metrics
