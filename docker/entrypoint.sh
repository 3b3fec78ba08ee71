#!/bin/bash
# Sources ROS 2, and a workspace where one is mounted, then becomes the command.
set -e
# shellcheck source=/dev/null
source "/opt/ros/${ROS_DISTRO}/setup.bash"
if [ -f "${OCCBEV_WORKSPACE:-/workspace}/install/setup.bash" ]; then
    # shellcheck source=/dev/null
    source "${OCCBEV_WORKSPACE:-/workspace}/install/setup.bash"
fi
exec "$@"
