"""Start the perception node, a bag and RViz; what is started is described in occbev.graph."""

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    ExecuteProcess,
    OpaqueFunction,
    SetEnvironmentVariable,
)
from launch.conditions import IfCondition
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import Node

from occbev import graph


def generate_launch_description():
    """Declare the arguments of the graph, then start what they ask for."""
    arguments = [DeclareLaunchArgument(a.name, default_value=a.default, description=a.text) for a in graph.ARGUMENTS]
    environment = [SetEnvironmentVariable(name, value) for name, value in graph.environment().items()]
    rviz = Node(
        package="rviz2",
        executable="rviz2",
        arguments=["-d", graph.rviz_file()],
        condition=IfCondition(LaunchConfiguration("rviz")),
    )
    return LaunchDescription([*arguments, *environment, OpaqueFunction(function=start), rviz])


def start(context):
    """Turn the arguments' values into processes."""
    values = {a.name: LaunchConfiguration(a.name).perform(context) for a in graph.ARGUMENTS}
    node = Node(
        package="occbev",
        executable=graph.EXECUTABLE,
        name=graph.NODE_NAME,
        namespace=values["namespace"],
        parameters=[graph.params_file(values), graph.parameters(values)],
        ros_arguments=["--log-level", values["log_level"]],
        output="screen",
    )
    if not values["bag"]:
        return [node]
    player = ExecuteProcess(cmd=graph.player_command(values), name="bag_player", output="screen")
    return [node, player]
