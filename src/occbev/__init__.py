"""occbev: multi-camera 3D boxes and occupancy voxels for ROS 2, from one Occ-BEV pre-trained network."""

__version__ = "0.1.0"
