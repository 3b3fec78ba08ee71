#!/bin/bash
# Sources ROS 2, the package's own workspace, and another one where it is mounted, then becomes the command.
set -e
for folder in "/opt/ros/${ROS_DISTRO}" "${OCCBEV_INSTALL}" "${OCCBEV_WORKSPACE:-/workspace}/install"; do
    if [ -f "${folder}/setup.bash" ]; then
        # shellcheck source=/dev/null
        source "${folder}/setup.bash"
    fi
done
# ros2 is a program of the distribution's Python: this is how it sees the packages of the virtual environment.
packages="$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
export PYTHONPATH="${PYTHONPATH:+${PYTHONPATH}:}${packages}"
exec "$@"
