"""Jobs of many pictures: read, checked, planned, and sampled so that no picture is lost or made twice."""
