"""From prepared images to raw network outputs: geometry tables, runtimes, and the ROS-free pipeline."""
