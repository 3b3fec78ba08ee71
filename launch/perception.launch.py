"""Start the perception node, a bag and RViz; what is started is described in occbev.graph.

Beside the arguments below, every parameter of the node may be given as NAME:=VALUE, as with `occbev run`.
"""

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    OpaqueFunction,
    SetEnvironmentVariable,
    Shutdown,
)
from launch_ros.actions import Node

from occbev import graph
from occbev.streams.parameters import find_leaf, read_values

ARGUMENTS = (*graph.ARGUMENTS, graph.RESPAWN)


def generate_launch_description():
    """Declare the arguments of the graph, then start what they ask for."""
    arguments = [
        DeclareLaunchArgument(a.name, default_value=a.default, description=a.text, choices=a.choices or None)
        for a in ARGUMENTS
    ]
    environment = [SetEnvironmentVariable(name, value) for name, value in graph.environment().items()]
    return LaunchDescription([*arguments, *environment, OpaqueFunction(function=start)])


def start(context):
    """Turn the arguments' values into processes, once everything that can be checked has been."""
    given = context.launch_configurations
    values = {a.name: given[a.name] for a in ARGUMENTS}
    graph.check_arguments(values)
    names = [name for name in given if name not in values and find_leaf(name) is not None]
    own = read_values({name: given[name] for name in names})
    respawn = graph.is_true(values["respawn"])
    node = Node(
        package="occbev",
        executable=graph.EXECUTABLE,
        name=graph.NODE_NAME,
        namespace=values["namespace"],
        parameters=[graph.params_file(values), {**graph.parameters(values), **own}],
        ros_arguments=["--log-level", values["log_level"]],
        output="screen",
        respawn=respawn,
        on_exit=None if respawn else end,
    )
    actions = [node]
    if graph.is_true(values["rviz"]):
        actions.append(Node(package="rviz2", executable="rviz2", arguments=graph.rviz_arguments(values)))
    if values["bag"]:
        player = graph.player_command(values, {name: given[name] for name in names})
        actions.append(ExecuteProcess(cmd=player, name="bag_player", output="screen"))
    return actions


def end(event, context):
    """End the launch with the node: without error where it has ended well, else with the error that `launch` reports."""
    if event.returncode > 0:
        raise RuntimeError(f"the perception node ended with status {event.returncode}; its messages say why")
    return [Shutdown(reason="the perception node has ended")]
